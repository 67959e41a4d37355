"""A repository of a model hub as it is at one commit: its files, their sizes and their hashes.

huggingface_hub resolves it, with the user's token, HF_ENDPOINT, offline mode and proxies. Names of
files come from strangers: those that could lead out of a folder are left out, and so is all that
is not weights, a config or a tokenizer. Nothing that could be executed is ever fetched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from flash_moe.errors import CheckpointError, FetchFailed, Remedy, UnsupportedModel
from flash_moe.format.manifest import MANIFEST, is_file_name
from flash_moe.pack.files import COPIED

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
WEIGHTS = "model*.safetensors"
INDEX = "model.safetensors.index.json"
# What a plan reads: with the headers of the weights, all that says what a model is.
PLANNED = ("config.json", INDEX, "hf_quant_config.json")
# Tokenizers take 30 MB at most.
MOST_SMALL_BYTES = 256_000_000
# Seconds in which the hub must answer a question.
ANSWER_SECONDS = 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`sha256` is of files in large-file storage; of the others, `blob` is git's SHA-1."""

    name: str
    size: int
    sha256: str | None
    blob: str | None

    def matches(self, data: bytes) -> bool:
        if self.sha256 is not None:
            return hashlib.sha256(data).hexdigest() == self.sha256
        return git_hash(data) == self.blob


@dataclass(frozen=True, slots=True)
class Repository:
    """`revision` is what was asked for, `commit` what it stood for."""

    name: str
    revision: str | None
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def weights(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if fnmatchcase(file.name, WEIGHTS))

    @property
    def small(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if not fnmatchcase(file.name, WEIGHTS))

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Repository:
        """KeyError, TypeError or ValueError for what `to_json` did not write."""
        return cls(
            _matching(_REPOSITORY, value["name"]),
            None if value["revision"] is None else _matching(_REVISION, value["revision"]),
            _matching(_COMMIT, value["commit"]),
            tuple(_file(f["name"], f["size"], f["sha256"], f["blob"]) for f in value["files"]),
        )


def is_repository_name(name: str) -> bool:
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def find_repository(name: str, revision: str | None = None) -> Repository:
    """Ask the hub; FetchFailed, CheckpointError or UnsupportedModel if nothing can be pulled."""
    if not is_repository_name(name):
        raise CheckpointError(f"{name!r:.120} is not the name of a repository, such as ORG/NAME.")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise CheckpointError(f"{revision!r:.120} cannot be a branch, a tag or a commit.")
    with hub_errors(name):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError

        try:
            info = HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS
            )
            names = {sibling.rfilename for sibling in info.siblings or ()}
            files = [
                _file(
                    sibling.rfilename,
                    sibling.size,
                    sibling.lfs.sha256 if sibling.lfs else None,
                    None if sibling.lfs else sibling.blob_id,
                )
                for sibling in info.siblings or ()
                if _is_wanted(sibling.rfilename)
            ]
            commit = _matching(_COMMIT, info.sha)
        except HFValidationError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # A proxy's page, or a mirror that writes something else.
            raise FetchFailed(
                f"What answers for {name} is not the hub, or a mirror that writes something else "
                f"({type(error).__name__}). Does this network want you to log in?"
            ) from error
    _require_weights(name, names)
    files.sort(key=lambda file: file.name)
    return Repository(name, revision, commit, tuple(files))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What huggingface_hub and its HTTP client raise, as errors for the user."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.OfflineModeIsEnabled as error:
        raise FetchFailed(
            "The hub is switched off: HF_HUB_OFFLINE is set. Unset it, then try again."
        ) from error
    except hub.GatedRepoError as error:
        raise FetchFailed(
            f"{name} is gated. Accept its terms on its page, then log in: hf auth login"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise FetchFailed(f"{name} has no such revision.") from error
    except hub.RepositoryNotFoundError as error:
        raise FetchFailed(
            f"The hub has no repository {name}, or not for you. If it is private, log in: "
            "hf auth login"
        ) from error
    except (hub.HfHubHTTPError, hub.FileMetadataError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = f"The hub answered {status}" if status else "The hub's answer is not understood"
        raise FetchFailed(f"{answer} for {name}. Try again later.") from error
    except hub.HFValidationError as error:
        raise CheckpointError(f"{name!r:.120} is not the name of a repository.") from error
    except network_errors() as error:
        from huggingface_hub import constants

        raise FetchFailed(
            f"Cannot reach {constants.ENDPOINT} ({type(error).__name__}). Is there a network?"
        ) from error


def network_errors() -> tuple[type[Exception], ...]:
    """Of huggingface_hub's HTTP client, and of what lies below."""
    from huggingface_hub.errors import HTTPError

    return (HTTPError, OSError)


def _require_weights(name: str, names: set[str]) -> None:
    if MANIFEST in names:
        raise UnsupportedModel(
            f"{name} is a pack already, and packs are not pulled yet. Download it, and add its "
            "folder.",
            Remedy.DOWNLOAD_AND_PACK,
        )
    if any(fnmatchcase(file, WEIGHTS) for file in names) and "config.json" in names:
        return
    if any(file.endswith(".gguf") for file in names):
        raise UnsupportedModel(
            f"{name} holds GGUF files, for llama.cpp and Ollama. Choose a repository with "
            "safetensors of the same model, such as one of mlx-community."
        )
    raise UnsupportedModel(
        f"{name} holds no config.json with model*.safetensors beside it. Choose a repository in "
        "MLX's or transformers' format."
    )


def _is_wanted(name: str) -> bool:
    """At the top of the repository, under a plain name."""
    return is_file_name(name) and any(fnmatchcase(name, pattern) for pattern in (*COPIED, WEIGHTS))


def _file(name: Any, size: Any, sha256: Any, blob: Any) -> RemoteFile:
    if not isinstance(name, str) or not _is_wanted(name):
        raise ValueError("a name that is not wanted")
    weights = fnmatchcase(name, WEIGHTS)
    if type(size) is not int or not 0 <= size < (1 << 44 if weights else MOST_SMALL_BYTES):
        raise FetchFailed(f"The hub gives {name} the impossible size {size!r:.40}.")
    if sha256 is not None:
        sha256 = _matching(_SHA256, sha256)
    elif blob is None or not _COMMIT.fullmatch(str(blob)):
        raise FetchFailed(f"The hub gives no hash of {name}, so it could not be checked.")
    return RemoteFile(name, size, sha256, None if sha256 else str(blob))


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r:.80} is not what the hub writes")
    return value
