"""Start the process that holds a model. It gets the lock and the socket as open files, so there is
no moment at which somebody has the one and nobody listens at the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import flash_moe
from flash_moe.errors import HolderGone
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Place

# As many as may ask at once before one is answered; macOS cuts it to 128.
WAITING = 512
# -P: nothing is imported from the folder that the user happens to be in. This package may be where
# only its caller looks, and must hide nothing of Python's own.
PACKAGES = Path(flash_moe.__file__).parents[1]
BEGIN = """\
import sys
sys.path.append(sys.argv[1])
from flash_moe.hold.begin import begin
begin(*sys.argv[2:])
"""
# For the first half of the process, which only starts the second.
FORK_SECONDS = 60


def launch(place: Place, lock: int, loading: Loading, name: str, seconds: float) -> None:
    """`lock` is closed here, and kept by the new process. HolderGone if there is none."""
    with suppress(OSError):
        place.socket.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(place.socket))
        place.socket.chmod(0o600)
        listener.listen(WAITING)
        place.record.unlink(missing_ok=True)
        _run(place, lock, listener.fileno(), loading, name, seconds)
    except (OSError, subprocess.SubprocessError) as error:
        place.clear(lock)
        raise HolderGone(
            f"A process that holds the model could not be started: {error}."
        ) from error
    finally:
        listener.close()
        os.close(lock)


def _run(
    place: Place, lock: int, listener: int, loading: Loading, name: str, seconds: float
) -> None:
    what = {"key": place.key, "folder": str(place.folder), "name": name, "seconds": seconds}
    text = json.dumps({**what, "loading": loading.to_json()})
    subprocess.run(
        [sys.executable, "-P", "-c", BEGIN, str(PACKAGES), text, str(lock), str(listener)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        pass_fds=(lock, listener),
        start_new_session=True,
        timeout=FORK_SECONDS,
        check=True,
    )
