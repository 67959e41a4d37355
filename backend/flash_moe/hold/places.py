"""Where the processes that hold models are: a folder of this user's own, three files for each.

    KEY.lock   locked by the process as long as it lives; only who has the lock writes or removes
    KEY.sock   where it listens
    KEY.json   what it says about itself: for people, and for whoever wants its memory

KEY begins the identity of what is held, so processes of other versions are never even asked.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flash_moe.errors import HolderGone
from flash_moe.process import resident_memory

KEY_LENGTH = 16
# macOS takes 104 bytes, with the zero at the end; Linux 108.
MOST_SOCKET_BYTES = 103
MOST_RECORD_BYTES = 1 << 16
STOP_SECONDS, KILL_SECONDS = 10.0, 5.0
TICK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a model, as it describes itself. Times are seconds since 1970; `used` is
    when its last reply ended, `until` when it goes if nobody asks, None for ever; `answering` is
    how many replies are being made; `namespace` says among which processes its number is one."""

    key: str
    pid: int
    name: str
    path: str
    settings: str
    version: str
    since: float
    used: float
    until: float | None
    answering: int
    namespace: str

    @property
    def resident_bytes(self) -> int | None:
        return resident_memory(self.pid)

    def holds(self, path: Path) -> bool:
        return self.path == printable(os.path.abspath(path))


@dataclass(frozen=True, slots=True)
class Place:
    folder: Path
    key: str

    @classmethod
    def of(cls, identity: str) -> Place:
        return cls(common_folder(), identity[:KEY_LENGTH])

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.key}.lock"

    @property
    def socket(self) -> Path:
        return self.folder / f"{self.key}.sock"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.key}.json"

    @property
    def draft(self) -> Path:
        """Of the record."""
        return self.folder / f"{self.key}.tmp"

    def take(self, create: bool = False) -> int | None:
        """The lock, as a file that is open; None if a process has it, or nothing is there."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        while True:
            try:
                lock = os.open(self.lock, flags, 0o600)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it may have removed it meanwhile.
                if os.path.samestat(os.fstat(lock), self.lock.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except FileNotFoundError:
                pass
            os.close(lock)

    def clear(self, lock: int) -> None:
        """For whoever has the lock, unless somebody removed it: another may be here by now."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), self.lock.stat()):
                for path in (self.socket, self.record, self.draft, self.lock):
                    path.unlink(missing_ok=True)

    def sweep(self) -> bool:
        """Remove what a process left that was killed. Whether nobody is there."""
        if (lock := self.take()) is None:
            return not self.lock.exists()
        try:
            self.clear(lock)
        finally:
            os.close(lock)
        return True

    def write(self, holder: Holder) -> None:
        """Readers meet the old record or the new one. It need not outlive a crash of the system."""
        self.draft.write_text(json.dumps(asdict(holder)), "utf-8")
        self.draft.replace(self.record)

    def read(self) -> Holder | None:
        try:
            with self.record.open("rb") as file:
                value = json.loads(file.read(MOST_RECORD_BYTES))
            names = ("name", "path", "settings", "version", "namespace")
            return Holder(
                self.key,
                pid=int(value["pid"]),
                **{name: printable(str(value[name])) for name in names},
                since=float(value["since"]),
                used=float(value["used"]),
                until=None if value["until"] is None else float(value["until"]),
                answering=int(value["answering"]),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return None


def common_folder() -> Path:
    """The system's folder for sockets of this user, which goes at log-out, or the temporary one."""
    own = f"flash-moe-{os.geteuid()}"
    # cron, sudo and su leave the variable unset; the folder is the same.
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    candidates = [runtime / "flash-moe"] if is_private(runtime) else []
    for folder in (*candidates, Path(tempfile.gettempdir()) / own):
        longest = len(os.fsencode(folder)) + len("/.sock") + KEY_LENGTH
        if folder.is_absolute() and longest <= MOST_SOCKET_BYTES:
            return folder
    return Path("/tmp") / own


def require_private(folder: Path) -> None:
    """Make it, or HolderGone if others could have put something there."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_private(folder):
        raise HolderGone(
            f"{folder} is not a folder that this user alone can open: move it away, or make it so."
        )


def is_private(path: Path) -> bool:
    """Whether it is a folder or a socket that is ours and nobody else's."""
    try:
        status = path.lstat()
    except OSError:
        return False
    kind = stat.S_ISDIR(status.st_mode) or stat.S_ISSOCK(status.st_mode)
    return kind and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def holders() -> list[Holder]:
    """Those that are there, of all versions, the oldest first; what others left is removed."""
    folder = common_folder()
    if not is_private(folder):
        return []
    places = [Place(folder, lock.stem) for lock in folder.glob("*.lock")]
    found = [holder for place in places if not place.sweep() and (holder := place.read())]
    return sorted(found, key=lambda holder: holder.since)


def stop(holder: Holder) -> None:
    """It ends, and its memory is free."""
    if holder.namespace != namespace():
        raise HolderGone(f"{holder.name} is held in another container. Stop it there.")
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        if ends(holder, number, seconds):
            return
    raise HolderGone(f"The process {holder.pid}, which holds {holder.name}, does not end.")


def ends(holder: Holder, number: int, seconds: float) -> bool:
    """Send it a signal, if it is still there. Whether it has ended within the time."""
    place = Place(common_folder(), holder.key)
    # Opened before the file is removed: the lock is free when the process has gone.
    try:
        lock = os.open(place.lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        if is_free(lock) or not place.lock.exists():
            return place.sweep()
        if holder.namespace != namespace():
            return False  # the number is another process's here
        with suppress(ProcessLookupError):
            os.kill(holder.pid, number)
        deadline = time.monotonic() + seconds
        while not (gone := is_free(lock)) and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
    finally:
        os.close(lock)
    if gone:
        place.sweep()
    return gone


def namespace() -> str:
    """Containers that share a folder have process numbers of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def printable(text: str) -> str:
    """Nothing that a terminal would take for a command."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
