"""Processes that hold a model, and what is asked of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from flash_moe import hold
from flash_moe.chat.event import Event
from flash_moe.hold import protocol
from flash_moe.hold.client import HeldModel, HeldReply
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Holder, Place, common_folder
from flash_moe.options import Request

# Longer than anything here takes on a busy machine.
PATIENCE = 120
LONG = 3600.0


def start(loading: Loading, seconds: float = LONG) -> Holder:
    """A process that has loaded the model."""
    with closing(hold.start(loading, "demo", seconds)) as model:
        model.wait()
    return eventually(lambda: idle(loading))


def idle(loading: Loading) -> Holder | None:
    key = Place.of(loading.identity()).key
    return next((one for one in hold.holders() if one.key == key and not one.answering), None)


def found(loading: Loading) -> HeldModel:
    model = hold.find(loading)
    assert model is not None
    return model


def ask(**options: Any) -> Request:
    return Request(messages=[{"role": "user", "content": "Hello"}], **options)


def reply(loading: Loading, request: Request) -> tuple[list[Event], HeldReply]:
    with closing(found(loading)) as model:
        answer = model.reply(request)
        return list(answer.events()), answer


def eventually(look: Callable[[], Any]) -> Any:
    """What it finds, as soon as there is something."""
    deadline = time.monotonic() + PATIENCE
    while not (result := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def is_gone(pid: int) -> bool:
    """A zombie counts as gone: its parent, the first process of a container, may not look."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] in ("", "Z")


def nothing_is_left() -> bool:
    return not common_folder().exists() or not any(common_folder().iterdir())


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@contextmanager
def speaking(place: Place, *frames: Any) -> Iterator[socket.socket]:
    """A connection on which so much was said."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(place.socket))
        with suppress(BrokenPipeError):  # it has heard enough
            for frame in frames:
                peer.sendall(frame if isinstance(frame, bytes) else protocol.pack(frame))
        yield peer


def said(peer: socket.socket) -> list[dict[str, Any]]:
    """Everything that is answered, up to the end of the connection."""
    data = b""
    try:
        while piece := peer.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass  # the system's word for data that was not read
    frames = []
    while data:
        end = 4 + protocol.length(data[:4])
        frames.append(protocol.unpack(data[4:end]))
        data = data[end:]
    return frames


def loading_of(folder: Path, tmp_path: Path) -> Loading:
    return Loading(folder, prompts=tmp_path / "prompts")
