"""Which of MLX's libraries this installation runs. Reads metadata only; MLX is not imported.

Every back end of MLX is a wheel with the same file in it, mlx/lib/libmlx.so, and the one written
last is the one that runs. pip writes CUDA's after the CPU's; uv writes them in any order, and an
upgrade without the extra brings the CPU's back. MLX does not complain then, it is only slow.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

_LIBRARIES = ("mlx/lib/libmlx.so", "mlx/lib/libmlx.dylib")


@dataclass(frozen=True, slots=True)
class Backends:
    """`installed` are the wheels that bring the library, `active` is the one whose library is on
    disk (None: none of them), `wanted` the one that should be; `mend` is a command if they
    differ."""

    installed: tuple[str, ...]
    active: str | None
    wanted: str | None
    mend: str | None

    @property
    def problem(self) -> str | None:
        """For the user, if they differ."""
        if self.mend is None:
            return None
        return "MLX is not using the back end that was installed for it. To mend that: " + self.mend


@dataclass(frozen=True, slots=True)
class _Owner:
    name: str
    version: str
    library: Path
    digest: str
    size: int | None


def find_backends(path: Sequence[str] | None = None, python: str = sys.executable) -> Backends:
    """Look where `import mlx` would; `path` stands in for sys.path."""
    mlx = next(iter(Distribution.discover(name="mlx", path=list(path or sys.path))), None)
    owners = sorted(_owners(Path(str(mlx.locate_file("")))), key=lambda o: o.name) if mlx else []
    if mlx is None or not owners:
        return Backends((), None, None, None)

    active = next((owner for owner in owners if _on_disk(owner, owners)), None)
    # Nobody gets CUDA unasked: where its wheel is, it is wanted.
    candidates = [owner for owner in owners if owner.name.startswith("mlx-cuda")] or owners
    wanted = max(candidates, key=lambda o: (o.version == mlx.version, o == active, o.name))

    return Backends(
        installed=tuple(owner.name for owner in owners),
        active=active.name if active else None,
        wanted=wanted.name,
        mend=_mend(wanted, wanted == active, mlx.version, python),
    )


def _mend(wanted: _Owner, active: bool, version: str, python: str) -> str | None:
    if wanted.version != version:
        options = ""
    elif not active:
        # Same version, so what it depends on is there: gigabytes, for CUDA.
        options = "--force-reinstall --no-deps "
    else:
        return None
    return f"{shlex.quote(python)} -m pip install {options}{wanted.name}=={version}"


def _owners(site: Path) -> Iterator[_Owner]:
    for folder in site.glob("mlx*.dist-info"):
        wheel = Distribution.at(folder)
        # Not wheel.files: it leaves out what is missing on disk.
        record = wheel.read_text("RECORD") or ""
        for entry, digest, size in (
            row for row in csv.reader(record.splitlines()) if len(row) == 3
        ):
            if entry in _LIBRARIES:
                yield _Owner(
                    name=wheel.name.lower().replace("_", "-"),
                    version=wheel.version,
                    library=site / entry,
                    digest=digest,
                    size=int(size) if size.isdecimal() else None,
                )


def _on_disk(owner: _Owner, owners: Sequence[_Owner]) -> bool:
    try:
        size = owner.library.stat().st_size
        if owner.size not in (None, size):
            return False
        # The sizes tell them apart (21 and 146 MB in 0.32.4) without reading the file.
        if sum(other.size in (None, size) for other in owners) == 1 and owner.size is not None:
            return True
        return owner.digest in ("", _sha256(owner.library))
    except OSError:
        return False


def _sha256(file: Path) -> str:
    """As RECORD writes it."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
