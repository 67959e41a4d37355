"""The predictions of a run as a file, so that later runs can be compared with it token by token.

In safetensors. Documents are identified by their token ids, so runs on other sections or with
other limits share the documents that both have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import CheckpointError, OptionError, Remedy
from flash_moe.evaluation.arrays import Array, Arrays, open_arrays, write_arrays
from flash_moe.evaluation.documents import digest
from flash_moe.format.sealed import Damaged

FORMAT = 1


class Reference:
    """`model` describes, for people, the model that predicted; `digest` identifies the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            about, arrays = open_arrays(path)
            if about["format"] != FORMAT:
                raise Damaged(f"its format is {about['format']}")
            self.model: dict[str, Any] = dict(about["model"])
            self._vocabulary = str(about["vocabulary"])
        except (Damaged, CheckpointError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a reference, or it is damaged ({error}).", Remedy.SAVE_REFERENCE
            ) from error
        self._documents: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            key, _, column = name.partition(".")
            self._documents.setdefault(key, {})[column] = array
        status = path.stat()
        self.digest = digest([about, status.st_size, status.st_mtime_ns])

    def require(self, tokenizer: ChatTokenizer) -> None:
        """OptionError, if the reference is of a model with another tokenizer."""
        if vocabulary_digest(tokenizer) != self._vocabulary:
            raise OptionError(
                f"{self.path} was saved by {self.model.get('model')}, which has another tokenizer, "
                "so tokens cannot be compared. Bits per byte of texts can."
            )

    def find(self, key: str) -> Arrays | None:
        """The recorded predictions of a document."""
        return self._documents.get(key)


def write_reference(
    path: Path, model: dict[str, Any], tokenizer: ChatTokenizer, documents: Arrays
) -> None:
    """`documents` has KEY.COLUMN for every column in predictions.RECORDED."""
    about = {"format": FORMAT, "model": model, "vocabulary": vocabulary_digest(tokenizer)}
    write_arrays(path, about, documents)


def vocabulary_digest(tokenizer: ChatTokenizer) -> str:
    return digest(sorted(tokenizer.tokenizer.get_vocab().items()))
