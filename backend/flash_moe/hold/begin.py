"""Where the process that holds a model begins, with what `launch.py` gives it."""

from __future__ import annotations

import os


def begin(what: str, lock: str, listener: str) -> None:
    # The process that started this one waits for this half alone, and has no zombie later.
    if os.fork():
        os._exit(0)
    from flash_moe.hold.holder import main

    main(what, int(lock), int(listener))
