"""How many of our files a reader has to open to follow a token: counted while it is computed.

python backend/benchmarks/trace.py

One layer: from the mixture of a layer down to the reader, of a token of the built-in model.
One prompt: from `llm -m` to the reader, with the engine loaded. Files are those that ran;
changes are how often the running function's file was another than before, returns included.
"""

from __future__ import annotations

import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import llm

PACKAGES = ("/flash_moe/", "/llm_flash_moe/")
BLOCKS = ("mixture.py",)


class Trace:
    """The files of ours that run, in order, until the first read."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.done = True
        self._since: tuple[str, ...] = ()
        # Before the inference thread starts: a running thread can have no profile any more.
        threading.setprofile(self)
        sys.setprofile(self)

    def start(self, since: tuple[str, ...] = ()) -> None:
        """From here on, or from the first call of a function in one of these files."""
        self.files, self.done, self._since = [], False, since

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.done:
            return
        path = frame.f_code.co_filename
        if event == "return" and path.endswith("/stream/reader.py") and self.files:
            self.done = True
            return
        # After a return, the caller runs on.
        if event == "return" and frame.f_back is not None:
            path = frame.f_back.f_code.co_filename
        begun = self.files or not self._since or Path(path).name in self._since
        ours = any(package in path for package in PACKAGES)
        if begun and ours and event in ("call", "return"):
            self.files.append(path)

    def report(self, title: str) -> None:
        names = sorted({self._short(path) for path in self.files})
        changes = sum(a != b for a, b in pairwise(self.files))
        print(f"{title}: {len(names)} files, {changes} changes of file")
        print("  " + " ".join(names))

    @staticmethod
    def _short(path: str) -> str:
        for package in PACKAGES:
            if package in path:
                return path.rpartition(package)[2]
        return path


def main() -> None:
    trace = Trace()
    model = llm.get_model("flash-moe-tiny")
    model.prompt("Hello", max_tokens=2).text()
    trace.start()
    model.prompt("Hello you", max_tokens=1).text()
    trace.report("llm -m to the first read")

    reply = iter(model.prompt("What is 4 + 3?", max_tokens=4))
    next(reply)
    trace.start(BLOCKS)
    next(reply)
    trace.report("one layer to its first read")
    list(reply)


if __name__ == "__main__":
    main()
