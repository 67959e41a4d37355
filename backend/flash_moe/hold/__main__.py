"""`python -m flash_moe.hold`: the process that holds a model. `launch.py` starts it."""

from __future__ import annotations

import os
import sys

# The process that started this one waits for the first half alone, and has no zombie later.
if os.fork():
    os._exit(0)

from flash_moe.hold.holder import main

main(*sys.argv[1:])
