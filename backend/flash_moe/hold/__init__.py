"""Models that stay: a process of their own holds one, and others use it through a socket.

    model = hold.start(hold.Loading(path), "my-model", seconds=600)   # or hold.find(…)
    for event in model.reply(request).events(): …

The socket is this user's alone, and a process is found only by those who would load exactly what
it holds: the same files, settings, code and libraries. Only the process itself imports MLX.
"""

from flash_moe.hold.client import HeldModel, HeldReply, find, start
from flash_moe.hold.connection import News
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Holder, holders, stop
from flash_moe.hold.room import make_room_for

__all__ = [
    "HeldModel",
    "HeldReply",
    "Holder",
    "Loading",
    "News",
    "find",
    "holders",
    "make_room_for",
    "start",
    "stop",
]
