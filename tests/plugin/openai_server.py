"""llm-chat-completions-server as a user starts it, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

from tests.plugin.terminal import LLM, environment

READY_SECONDS = 60


@contextmanager
def serving(home: Path) -> Iterator[tuple[OpenAI, subprocess.Popen[bytes]]]:
    """A client of a server with this folder as llm's own, and the server's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    log = home / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [str(LLM), "chat-completions-server", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(), "LLM_USER_PATH": str(home)},
        ) as process,
    ):
        try:
            _wait(client, process, log)
            yield client, process
        finally:
            process.terminate()
            if process.wait(30) not in (0, -15):
                print(log.read_text())


def _wait(client: OpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            client.models.list()
        except APIConnectionError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"the server does not answer:\n{log.read_text()}")
