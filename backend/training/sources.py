"""English technical text to learn the language from: the documentation packages of Debian 12.

Their HTML and not their reStructuredText is read: roles, substitutions, tables and the text taken
from docstrings are already resolved in it, so one small converter does for all of them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from training.dialogue import reserved

SPHINX = ("<section", "</section>")
OLD_SPHINX = ('<div class="section"', '<div class="yui-b"')
WHOLE_BODY = ("<body", "</body>")


@dataclass(frozen=True, slots=True)
class Package:
    """`content` is what the part of a page worth reading begins and ends with."""

    name: str
    licence: str
    folder: str
    content: tuple[str, str] = SPHINX


# The licences as their copyright files say; the order is the order of the text.
PACKAGES = (
    Package("python3.11-doc", "PSF-2.0", "python3.11/html"),
    Package("python-attr-doc", "MIT", "python-attr-doc/html"),
    Package("python-click-doc", "BSD-3-Clause", "python-click-doc/html"),
    Package("python-requests-doc", "Apache-2.0", "python-requests-doc/html"),
    Package("python-pytest-doc", "MIT", "python-pytest-doc/html"),
    Package("python-flask-doc", "BSD-3-Clause", "python-flask-doc/html"),
    Package("python-jinja2-doc", "BSD-3-Clause", "python-jinja2-doc/html"),
    Package("python-werkzeug-doc", "BSD-3-Clause", "python-werkzeug-doc/html"),
    Package("python-aiohttp-doc", "Apache-2.0", "python-aiohttp-doc/html"),
    Package("python-tornado-doc", "Apache-2.0", "python-tornado-doc/html"),
    Package("sphinx-doc", "BSD-2-Clause", "sphinx-doc/html"),
    Package("python-sqlalchemy-doc", "MIT", "python-sqlalchemy-doc/html"),
    Package("python-django-doc", "BSD-3-Clause", "python-django-doc/html", OLD_SPHINX),
    Package("python-pandas-doc", "BSD-3-Clause", "python-pandas-doc/html"),
    Package("sqlite3-doc", "public domain", "sqlite3", WHOLE_BODY),
    Package("postgresql-doc-15", "PostgreSQL", "postgresql-doc-15/html", WHOLE_BODY),
)

# Navigation, lists of names, legal texts, tests, and news of versions that nobody runs any more.
DULL = re.compile(
    r"(^|/)(_\w+|genindex[^/]*|search|py-modindex|contents|copyright|license|bookindex|legalnotice)"
    r"(/|\.html|$)|whatsnew/(2|3\.[0-7]\b|changelog|v0|index)|plugin_list|chang(es|elog)|/ja/"
    r"|releases?[-/]|releaselog/|^releases?\.html|search\.d/|history|requirements\.html|matrix/"
    r"|doc_\w+_crossref|keyword_index|symbols|chronology|contributors|/api/pandas\.io\.stata"
)
SHORTEST, LONGEST_REPEATED = 400, 100


@dataclass(frozen=True, slots=True)
class Document:
    source: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, or what else stands alone. `kind` is "text", "code" or a definition's kind.

    Definitions ("function", "method", …) have their full name, and their signature as text.
    """

    kind: str
    text: str
    name: str = ""
    depth: int = 0


def fetch(folder: Path) -> None:
    """Download and unpack what is not there yet."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise SystemExit(
                f"{program} is missing: fetch the documentation on Debian 12 (bookworm)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (folder / f"{package.name}.unpacked").exists():
            continue
        subprocess.run(["apt-get", "download", package.name], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package.name}_*.deb")
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
        archive.unlink()
        # Last, so that what was broken off is done again.
        (folder / f"{package.name}.unpacked").touch()


def pages(folder: Path, package: Package, only: str = "") -> Iterator[tuple[str, list[Block]]]:
    """The pages of a package with their names, in the order of the names; `only` is a pattern."""
    root = folder / "usr/share/doc" / package.folder
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is missing: fetch({str(folder)!r}) first")
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.html")}
    for name in sorted(paths):
        if re.match(only, name) and not DULL.search(name):
            yield name, read_page(paths[name].read_text("utf-8", "replace"), package.content)


def read_page(html: str, content: tuple[str, str] = SPHINX) -> list[Block]:
    begin, end = html.find(content[0]), html.rfind(content[1])
    if begin < 0:
        return []
    page = Page()
    page.feed(html[begin : end if end > begin else len(html)])
    page.close()
    page.flush()
    return page.blocks


def documents(folder: Path) -> Iterator[Document]:
    """Clean text, without what occurred before, in an order that is always the same."""
    seen: set[bytes] = set()
    for package in PACKAGES:
        for name, blocks in pages(folder, package):
            text = "\n\n".join(block_text(block) for block in blocks if is_new(block, seen))
            if len(text) >= SHORTEST:
                yield Document(package.name, name.removesuffix(".html"), tight_lists(text) + "\n")


def is_held_out(document: Document) -> bool:
    return reserved(document.source, document.name, share=0.01)


def is_new(block: Block, seen: set[bytes]) -> bool:
    """Short blocks may come again; text that is hardly Latin is no use to a small vocabulary."""
    if sum(map(str.isascii, block.text)) < 0.9 * len(block.text):
        return False
    if len(block.text) < LONGEST_REPEATED:
        return True
    digest = hashlib.sha256(block.text.encode()).digest()
    return digest not in seen and not seen.add(digest)  # type: ignore[func-returns-value]


def block_text(block: Block) -> str:
    if block.kind == "code":
        return f"```{block.name}\n{block.text}\n```"
    return block.text if block.kind == "text" else f"`{block.text}`"


def tight_lists(text: str) -> str:
    """List items and rows of a table follow each other without an empty line."""
    return re.sub(r"(?m)^((?:- |\| ).*)\n\n(?=- |\| )", r"\1\n", text)


SKIPPED = frozenset({"script", "style", "form", "nav", "svg", "math", "button", "footer", "title"})
SKIPPED_CLASSES = re.compile(
    r"(headerlink|toctree-wrapper|seealso|navheader|navfooter|toc|contents|topic|sphinxsidebar"
    r"|related|nosearch|fancy_toc|toc_list|indextable|viewcode-link|sectionauthor|lineno|linenos"
    r"|prev-next-area|breadcrumb)$"
)
BREAKS = re.compile("(p|div|section|ul|ol|dl|dt|dd|table|blockquote|hr|li|body|center)$")
HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
PYTHON = re.compile("highlight-(py|default|ipython)")
QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\xa0": " ", "\u200b": None})
NOISE = re.compile(
    r"(Source code: .*|Raises an auditing event .*|This page last modified on .*|Note|Warning|Tip"
    r"|Important|Caution|See also|[-—\s]*|Full name: .*|See also lists of .*"
    r"|.*Part of the Stable ABI.*|Table of Contents.*)$"
)


class Page(HTMLParser):
    """Collects blocks. Unclosed elements, of which SQLite's pages are full, do not disturb it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.parts: list[str] = []
        self.kinds: list[str] = []  # of the definition lists around
        self.names: list[str] = []  # of the definition being read: one element while in its <dt>
        self.prefix = ""
        self.skipping = ("", 0)
        self.code = self.pre = self.cell = 0
        self.language = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        skipped, depth = self.skipping
        if depth:
            self.skipping = (skipped, depth + (tag == skipped))
            return
        values = dict(attrs)
        classes = (values.get("class") or "").split()
        if tag in SKIPPED or any(map(SKIPPED_CLASSES.match, classes)):
            if tag not in ("p", "img", "li"):
                self.skipping = (tag, 1)
            return
        if tag == "div" and any(name.startswith("highlight-") for name in classes):
            self.language = (
                "python" if re.search("py(thon|con)|highlight-default", " ".join(classes)) else ""
            )
        self.opened(tag, classes, values)

    def opened(self, tag: str, classes: list[str], values: dict[str, str | None]) -> None:
        if BREAKS.match(tag) and not self.cell:
            self.flush()
        if tag in HEADINGS:
            self.flush()
            self.prefix = HEADINGS[tag] + " "
        elif tag == "pre":
            self.flush()
            self.pre = 1
        elif tag == "li" and not self.cell:
            self.prefix = "- "
        elif tag == "dl":
            self.kinds.append(classes[1] if len(classes) > 1 and classes[0] == "py" else "")
        elif tag == "dt" and self.kinds and self.kinds[-1]:
            self.names = [values.get("id") or ""]
        elif tag == "tr":
            self.flush()
            self.cell = 1
        elif tag in ("td", "th") and self.cell:
            self.parts.append(" | ")
        elif tag in ("code", "tt"):
            self.mark("`", opening=True)
        elif tag == "em":
            self.mark("*")
        elif tag == "span" and "classifier" in classes:
            self.parts.append(": ")
        elif tag == "br":
            self.parts.append("\n" if self.pre else " ")

    def handle_endtag(self, tag: str) -> None:
        skipped, depth = self.skipping
        if depth:
            self.skipping = (skipped, depth - (tag == skipped))
        elif tag == "pre":
            self.flush()
            self.pre = 0
        elif tag in ("code", "tt"):
            self.mark("`", opening=False)
        elif tag == "em":
            self.mark("*")
        elif tag == "dl" and self.kinds:
            self.flush()
            self.kinds.pop()
        elif tag in ("tr", "table"):
            self.flush()
            self.cell = 0
        elif (BREAKS.match(tag) and not self.cell) or tag in HEADINGS:
            self.flush()

    def mark(self, sign: str, opening: bool | None = None) -> None:
        """Marks of code and emphasis, which within code and signatures would only disturb."""
        if opening is not None:
            self.code += 1 if opening else -1 if self.code else 0
            if self.code != (1 if opening else 0):
                return
        elif self.code:
            return
        if not self.pre and not self.names:
            self.parts.append(sign)

    def handle_data(self, data: str) -> None:
        if not self.skipping[1]:
            self.parts.append(data)

    def flush(self) -> None:
        """End the block that is being read."""
        text, self.parts = "".join(self.parts).translate(QUOTES), []
        prefix, names = self.prefix, self.names
        if self.pre:
            text = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
            if text.strip():
                self.blocks.append(Block("code", text, self.language))
            return
        text = " ".join(text.split()).replace("``", "")
        if not text.replace("**", "").strip("| "):
            return
        self.prefix, self.names, self.code = "", [], 0
        if names:
            self.blocks.append(Block(self.kinds[-1], text, names[0], len(self.kinds)))
        elif not NOISE.match(text):
            text = f"{text} |" if self.cell else prefix + text
            self.blocks.append(Block("text", text, depth=len(self.kinds)))
