"""Who is at the other end of a socket: nobody but this user is talked to."""

from __future__ import annotations

import ctypes
import os
import socket
import struct


def is_this_user(peer: socket.socket) -> bool:
    try:
        return _uid(peer) == os.geteuid()
    except OSError:
        return False


def _uid(peer: socket.socket) -> int:
    if hasattr(socket, "SO_PEERCRED"):  # Linux: pid, uid, gid
        credentials = struct.Struct("3i")
        given = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        return int(credentials.unpack(given)[1])
    # macOS and the BSDs
    uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
    library = ctypes.CDLL(None, use_errno=True)
    if library.getpeereid(peer.fileno(), ctypes.byref(uid), ctypes.byref(gid)):
        raise OSError(ctypes.get_errno(), "getpeereid")
    return uid.value
