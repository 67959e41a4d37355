"""What Python's documentation says of each name: entries, out of its pages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from training.library_words import (
    OWN,
)
from training.sources import PACKAGES, Block, pages


@dataclass(frozen=True, slots=True)
class Entry:
    """`short` are the names it may be asked by, `module` is empty for builtins."""

    name: str
    kind: str
    signature: str
    text: str
    module: str
    short: tuple[str, ...] = ()


BUILTIN_PAGES = re.compile(
    r"(library/(functions|stdtypes|exceptions|constants)|tutorial/datastructures)\.html"
)
# What hardly anybody asks for, of which there is much.
TYPES = ["str", "list", "dict", "set", "tuple", "int", "float", "bytes"]
RARE = re.compile(r"test\.|token\.[A-Z]|xml\.parsers\.expat\.e|msilib|ossaudio|lib2to3|distutils")
OPEN_END = re.compile(
    r"\b(following.*|are|is|as|for example|to|like|of|by|with|includes?|methods?|attributes?|values"
    r"|form|forms|and|or|than|returns?|if|that|used|defined|arguments|functions?|named):$"
)
HISTORY = re.compile("(New|Changed|Deprecated) (in|since)|Availability")
SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<=[.!?])\s+(?=[A-Z*`\"(])")
USELESS = re.compile(
    r"(?i)((new|changed) in|deprecated|availability|see|(for )?example|the following|as above|note"
    r"|same as above|if (?!.*return)|this \w+ is (deprecated|the same)|for|otherwise|these"
    r"|they|it|this is useful|(unix|windows) only|not|or|like the|in case|in addition|however"
    r"|also|when|by default|by|some|but"
    r"|(the )?optional|because|since|in this|in that|here|there|additionally|furthermore|unlike"
    r"|-|\||all arguments|usage|return value)\b|.*(:|\bbelow\.|following\W.*|see \S+\.)$"
)
LONGEST_TEXT, LONGEST_HEAD, LONGEST_SIGNATURE = 220, 60, 300


def entries(folder: Path) -> list[Entry]:
    """The modules and what they define, by name. Those without a useful text have none."""
    modules = module_lines(folder)
    found: dict[str, Entry] = {}
    for page, blocks in pages(folder, PACKAGES[0], "library/|tutorial/datastructures"):
        for block, text in described(blocks):
            add_entry(found, block, text, modules, BUILTIN_PAGES.match(page) is not None)
    found |= {f"{m} module": Entry(m, "module", "", text, m) for m, text in modules.items()}
    return with_short_names([found[key] for key in sorted(found)])


def module_lines(folder: Path) -> dict[str, str]:
    root = folder / "usr/share/doc" / PACKAGES[0].folder
    html = (root / "py-modindex.html").read_text("utf-8")
    rows = [re.split("<em>|</em>", row) for row in html.split("<tr") if 'class="xref">' in row]
    lines: dict[str, str] = {}
    for first, *rest in rows:
        name = re.sub('.*class="xref">|</code>.*', "", first, flags=re.S).strip()
        text = next((part for part in rest[::-1] if part.strip()[:1].isalpha()), "")
        lines[name] = OWN.get(name) or useful_text(unescape(text).strip().rstrip(".") + ".")
    return {name: text for name, text in lines.items() if not RARE.match(name)}


def described(blocks: list[Block]) -> Iterator[tuple[Block, str]]:
    """Definitions with the first paragraph below; several definitions may share one."""
    waiting: list[Block] = []
    before = "text"
    for block in blocks:
        if block.kind not in ("text", "code"):
            together = (
                before not in ("text", "code") and waiting[-1:] and waiting[-1].depth == block.depth
            )
            waiting = [*waiting, block] if together else [block]
        elif waiting and block.kind == "text" and not HISTORY.match(block.text):
            yield from ((each, block.text) for each in waiting if each.depth == block.depth)
            waiting = []
        before = block.kind


def add_entry(
    found: dict[str, Entry], block: Block, text: str, modules: dict[str, str], builtin: bool
) -> None:
    """The first description of a name wins, and the longest signature."""
    match = re.match(r"(?:[a-z]+ )*@?([\w.]+)(\(.*\))?", block.text)
    name = (block.name if re.match(r"[\w.]+$", block.name) else "") or (match and match[1]) or ""
    parts = name.split(".")
    module = next(
        (m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in modules), ""
    )
    if (
        not re.match(r"[A-Za-z_][\w.]*$", name)
        or bool(module) == builtin
        or name in modules
        or RARE.match(name)
    ):
        return
    arguments = (match and match[2]) or ("()" if block.kind in ("function", "method") else "")
    signature = name + arguments.partition(" -> ")[0].replace(" /,", "").replace(", /)", ")")
    old = found.get(name)
    kind = {"data": "constant" if parts[-1].isupper() else "variable"}.get(block.kind, block.kind)
    kind = "type" if builtin and kind == "class" else kind
    known = old.text if old else ""
    if old and len(old.signature) > len(signature):
        signature = old.signature
    found[name] = Entry(name, kind, signature, OWN.get(name) or known or useful_text(text), module)


def useful_text(text: str) -> str:
    """The first sentence, and the second if both are short; nothing if they would say nothing."""
    text = re.sub(r"(?<![\w`*])\*([A-Za-z_]\w*)\*(?![\w*])", r"`\1`", text)
    first, *rest = SENTENCE.split(" ".join(text.split()))
    if re.search(r"\*\w+( \w+)*\*", first):
        first = re.sub(r"\*(\w+(?: \w+)*)\*", r"\1", first)
    if first.endswith(":") and not OPEN_END.search(first):
        first = first[:-1] + "."
    if not 10 <= len(first) <= LONGEST_TEXT or USELESS.match(first) or first[-1] not in ".!":
        return ""
    more = rest[0] if rest and len(first) < 60 else ""
    fits = more and len(first) + len(more) < 150 and more[-1] == "." and not USELESS.match(more)
    return f"{first} {more}" if fits and "*" not in more else first


def with_short_names(found: list[Entry]) -> list[Entry]:
    """Short names are those that name one thing only, and no module."""
    uses = Counter(suffix for each in found for suffix in suffixes(each.name))
    taken = {each.name for each in found}
    return [
        Entry(e.name, e.kind, e.signature, e.text, e.module, tuple(short_names(e, uses, taken)))
        for e in found
    ]


def suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def short_names(entry: Entry, uses: Counter[str], taken: set[str]) -> Iterator[str]:
    for suffix in suffixes(entry.name):
        if uses[suffix] == 1 and suffix not in taken and len(suffix) > 2 and entry.kind != "module":
            yield suffix


def head(entry: Entry) -> str:
    """How an answer names its subject: with its arguments while they are few."""
    return entry.signature if 0 < len(entry.signature) <= LONGEST_HEAD else entry.name
