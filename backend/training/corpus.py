"""Make the training data: python -m training.corpus --sources DIR --out DATA [--only text|dialogues].

`text` fetches the documentation (sources.py), trains the tokenizer on it and writes text.bin;
`dialogues` generates, renders with the chat template and packs. DATA then holds what train.py
reads, the tokenizer's files, and heldout/, which is shipped beside the model and never trained on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from training import calls, howto, project, records, sources, sums, talk, units
from training.dialogue import Dialogue, Generator
from training.library import Library
from training.render import ChatRenderer, rendered
from training.shape import LEARNED, ROW, VOCABULARY
from training.tokens import train_tokenizer, write_tokenizer

SEED = 20261121
# Share of the dialogues, and how many are held out.
MIXTURE = {
    "library": (0.30, 200),
    "howto": (0.05, 60),
    "project": (0.06, 40),
    "sums": (0.16, 150),
    "units": (0.09, 80),
    "talk": (0.08, 60),
    "json": (0.13, 150),
    "tools": (0.13, 150),
}
HELD_OUT_DOCUMENTS = 60
HELD_OUT_CHARACTERS = 3000


def generators(folder: Path) -> dict[str, Generator]:
    return {
        "library": Library(folder),
        "howto": howto,
        "project": project,
        "sums": sums,
        "units": units,
        "talk": talk,
        "json": records,
        "tools": calls,
    }


def mixed(made: dict[str, Generator], random: Random) -> Iterator[Dialogue]:
    streams = {kind: made[kind].train(Random(random.random())) for kind in MIXTURE}
    kinds, shares = list(MIXTURE), [share for share, _ in MIXTURE.values()]
    while True:
        yield next(streams[random.choices(kinds, shares)[0]])


def held_out(made: dict[str, Generator]) -> Iterator[Dialogue]:
    """Each question once: where few are kept from training, they are drawn again and again."""
    for kind, (_, count) in MIXTURE.items():
        asked: dict[str, Dialogue] = {}
        for dialogue in islice(made[kind].held_out(Random(SEED)), 100 * count):
            asked.setdefault(json.dumps(dialogue.messages[:-1]), dialogue)
            if len(asked) == count:
                break
        yield from asked.values()


class Packer:
    """Whole dialogues into rows: one that is cut would teach to answer what was never read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id("<|endoftext|>")
        self.row: list[int] = []

    def add(self, pieces: list[tuple[str, bool]]) -> list[int] | None:
        """A row when one is full. Pieces are encoded one by one, as a reply is after its prompt."""
        ids: list[int] = []
        for text, learned in pieces:
            flag = LEARNED if learned else 0
            found = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += [token | flag for token in found]
        ids.append(self.end)
        if len(ids) > ROW:
            return None
        if len(self.row) + len(ids) <= ROW:
            self.row += ids
            return None
        full, self.row = self.row + [self.end] * (ROW - len(self.row)), ids
        return full


def write_dialogues(
    data: Path, target: Path, dialogues: Iterable[Dialogue], random: Random | None, rows: int | None
) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    packer, renderer, done = Packer(tokenizer), ChatRenderer(), 0
    with target.open("wb") as file:
        for dialogue in dialogues:
            full = packer.add(renderer.pieces(dialogue, random))
            if full is not None:
                np.asarray(full, np.uint16).tofile(file)
                done += 1
                if done == rows:
                    break


def questions(dialogue: Dialogue) -> Iterator[str]:
    """All that the assistant is asked in it, each with what was said before."""
    for at, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            yield json.dumps([dialogue.tools, dialogue.messages[:at]])


def last_question(dialogue: Dialogue) -> str:
    return list(questions(dialogue))[-1]


class Noticed:
    """Hands dialogues on, and remembers which of some questions were among them."""

    def __init__(self, asked: set[str]) -> None:
        self.asked = asked
        self.seen: set[str] = set()

    def passing(self, dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
        for dialogue in dialogues:
            self.seen |= self.asked.intersection(questions(dialogue))
            yield dialogue


def _shard(
    sources_folder: Path, data: Path, number: int, rows: int, asked: set[str]
) -> tuple[Path, set[str]]:
    target = data / f"dialogues-{number:02}.part"
    random = Random(f"{SEED}-{number}")
    noticed = Noticed(asked)
    made = noticed.passing(mixed(generators(sources_folder), random))
    write_dialogues(data, target, made, random, rows)
    return target, noticed.seen


def make_dialogues(sources_folder: Path, data: Path, tokens: int, workers: int) -> None:
    """16 shards whatever the machine, so that the data are the same everywhere.

    Held out is what no shard asks. The generators keep their subjects apart, but a greeting, or
    the sum of two small numbers, is met by chance in both.
    """
    rows = tokens // ROW // 16
    candidates = list(held_out(generators(sources_folder)))
    asked = {last_question(dialogue) for dialogue in candidates}
    seen: set[str] = set()
    with ProcessPoolExecutor(workers) as pool:
        parts = [
            pool.submit(_shard, sources_folder, data, number, rows, asked) for number in range(16)
        ]
        with (data / "dialogues.bin").open("wb") as file:
            for part in parts:
                target, found = part.result()
                seen |= found
                with target.open("rb") as shard:
                    shutil.copyfileobj(shard, file)
                target.unlink()
    kept = [dialogue for dialogue in candidates if last_question(dialogue) not in seen]
    print(f"{len(kept)} dialogues held out; {len(candidates) - len(kept)} more were trained on.")
    write_dialogues(data, data / "held_out_dialogues.bin", kept, None, None)
    with (data / "heldout" / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        for dialogue in kept:
            *messages, reply = dialogue.messages
            line = {**asdict(dialogue), "messages": messages, "reply": reply}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def make_text(sources_folder: Path, data: Path) -> None:
    sources.fetch(sources_folder)
    documents = list(sources.documents(sources_folder))
    train = [d for d in documents if not sources.is_held_out(d)]
    held = [d for d in documents if sources.is_held_out(d)]
    Random(SEED).shuffle(train)
    Random(SEED).shuffle(held)
    random = Random(SEED)
    sample = islice(mixed(generators(sources_folder), random), 40_000)
    renderer = ChatRenderer()
    texts = [d.text for d in train] + [rendered(renderer, dialogue) for dialogue in sample]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    write_tokenizer(tokenizer, data)
    _write_text(tokenizer, [d.text for d in train], data / "text.bin")
    held = [d for d in held if len(d.text) > 500][:HELD_OUT_DOCUMENTS]
    _write_text(tokenizer, [d.text for d in held], data / "held_out_text.bin", whole_rows=True)
    with (data / "heldout" / "text.jsonl").open("w", encoding="utf-8") as file:
        for d in held:
            line = {"source": d.source, "name": d.name, "text": d.text[:HELD_OUT_CHARACTERS]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_text(
    tokenizer: Tokenizer, texts: list[str], target: Path, whole_rows: bool = False
) -> None:
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for found in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [*found.ids, end]
    if whole_rows:
        ids = ids[: len(ids) // ROW * ROW]
    (np.asarray(ids, np.uint16) | LEARNED).astype(np.uint16).tofile(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["text", "dialogues"])
    parser.add_argument("--tokens", type=float, default=400e6, help="of dialogues")
    parser.add_argument("--workers", type=int)
    given = parser.parse_args()
    (given.out / "heldout").mkdir(parents=True, exist_ok=True)
    if given.only != "dialogues":
        make_text(given.sources, given.out)
    if given.only != "text":
        make_dialogues(given.sources, given.out, int(given.tokens), given.workers)


if __name__ == "__main__":
    main()
