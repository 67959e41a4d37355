"""Ctrl-C at a terminal: it stops a reply in `llm chat`, and `llm prompt` as a whole."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest

from flash_moe.native.build import find_compiler
from tests.plugin.terminal import LLM, environment, logged

MOMENT = 0.5
PATIENCE = 120  # seconds, for a busy machine; nothing here waits for time to pass
CTRL_C = b"\x03"
STATUS = re.compile(r"\r\x1b\[2m.*?(\x1b\[0m\x1b\[K|$)")


@pytest.fixture(autouse=True)
def demo(demo_folder: Path, llm_home: Path) -> None:
    """A model of random weights, which goes on for thousands of tokens."""
    registry = llm_home / "llm-flash-moe" / "models.json"
    registry.parent.mkdir(parents=True)
    registry.write_text(json.dumps({"models": {"demo": {"path": str(demo_folder)}}}))


class Terminal:
    """`llm` with a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(LLM, [str(LLM), *arguments], environment() | {"TERM": "dumb"})
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def quiet(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        return not select.select([self._fd], [], [], seconds)[0]

    def read(self) -> str:
        """What comes next; empty at the end."""
        assert not self.quiet(PATIENCE), self.shown
        try:
            text = os.read(self._fd, 4096).decode(errors="replace")
        except OSError:  # how Linux says that the other side is gone
            text = ""
        self.shown += text
        return text

    def say(self, line: bytes) -> None:
        """Again if need be: what is typed while readline sets the terminal up is lost."""
        count = self.shown.count(line.decode())
        while self.shown.count(line.decode()) == count:
            self.type(line + b"\r")
            while not self.quiet(MOMENT) and self.shown.count(line.decode()) == count:
                assert self.read(), self.shown

    def press_until_the_end(self) -> int:
        """Two presses that come at once are one to the system, and early ones may be lost."""
        while True:
            with suppress(OSError):  # it is gone already
                self.type(CTRL_C)
            while not self.quiet(MOMENT):
                if not self.read():
                    return self.status()

    def wait_for(self, text: str, count: int = 1) -> None:
        while self.shown.count(text) < count:
            assert self.read(), self.shown

    def grow(self, characters: int) -> None:
        """So much more is said, status lines not counted."""
        length = len(STATUS.sub("", self.shown))
        while len(STATUS.sub("", self.shown)) < length + characters:
            assert self.read(), self.shown

    def status(self) -> int:
        while self.read():
            pass
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_in_chat_the_reply_stops_and_is_kept_and_the_chat_goes_on() -> None:
    with Terminal("chat", "-m", "demo") as chat:
        chat.wait_for("> ")
        chat.say(b"Hello")
        chat.grow(60)
        chat.type(CTRL_C)
        chat.wait_for("\n> ", 2)
        chat.say(b"And now?")
        chat.grow(60)
        chat.type(CTRL_C)
        chat.wait_for("\n> ", 3)
        chat.say(b"quit")
        assert chat.status() == 0
    first, second = logged()
    for turn in (first, second):
        assert turn["response_json"]["finish_reason"] == "cancelled"
        assert turn["response"].strip()
    assert first["conversation_id"] == second["conversation_id"]
    # What was said so far is part of the conversation.
    assert second["input_tokens"] > first["input_tokens"] + first["output_tokens"] / 2


def test_the_first_reply_says_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: six seconds of silence look like a fault. To a terminal alone, and gone before the
    first word."""
    if find_compiler() is None:
        pytest.skip("this machine has no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shown = []
    for _ in range(2):
        with Terminal("-m", "demo", "-o", "max_tokens", "3", "Hello") as prompt:
            assert prompt.status() == 0
            shown.append(prompt.shown)
    first, second = shown
    notice = "compiling the reader for this processor, once"
    assert 0 <= first.find(notice) < first.rfind("\r\x1b[K") < len(first) - len("\r\x1b[K")
    assert "compiling" not in second


def test_in_chat_ctrl_c_at_the_prompt_ends_the_chat() -> None:
    with Terminal("chat", "-m", "demo") as chat:
        chat.wait_for("> ")
        # One more may come while the process is ending.
        assert chat.press_until_the_end() in (1, -signal.SIGINT)


def test_a_prompt_is_aborted_as_a_whole() -> None:
    """It must not end as if the reply were whole, since another program may read it."""
    with Terminal("-m", "demo", "Hello") as prompt:
        prompt.grow(60)
        prompt.type(CTRL_C)
        assert prompt.status() == 1
        assert "Aborted!" in prompt.shown
        assert "Traceback" not in prompt.shown
    assert not (Path(os.environ["LLM_USER_PATH"]) / "logs.db").exists() or logged() == []


def test_pressing_again_aborts_the_chat() -> None:
    with Terminal("chat", "-m", "demo") as chat:
        chat.wait_for("> ")
        chat.say(b"Hello")
        chat.grow(30)
        assert chat.press_until_the_end() in (1, -signal.SIGINT)
        assert "Traceback" not in chat.shown
