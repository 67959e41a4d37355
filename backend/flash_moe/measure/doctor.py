"""What computes the experts on this machine and why, and what would make it faster.

MLX is imported inside, and its failure is a result like any other: a doctor must not need a healthy
patient.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_moe.machine import Machine, inspect_machine
from flash_moe.measure.advice import gpu_advice, mend_import
from flash_moe.mlx_library import Backends, find_backends

if TYPE_CHECKING:
    from flash_moe.measure.disk import Disk

MOVE_CACHE = (
    "The cache folder cannot be used, so the kernels are compiled anew at every start. Set "
    "XDG_CACHE_HOME to a folder that you alone can write to, on a disk that programs may run from."
)


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """`compiler`: None where the file came with the package. `kept`: whether the next start finds
    it where it is."""

    simd: str
    threads: int
    compiler: str | None
    file: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`broken` and `faster` are sentences for the user, each with the command that helps. The
    runtime is None if MLX cannot be loaded; `native` is None where those kernels are not used.
    `reader`: what reads experts, native or Python."""

    runtime: str | None
    why: str
    faster: tuple[str, ...]
    broken: tuple[str, ...]
    widen: bool
    mlx: str | None
    device: str | None
    backends: Backends
    native: NativeKernel | None
    reader: str
    machine: Machine

    @classmethod
    def of_machine(cls) -> Diagnosis:
        """Compiles the native kernels if they would be used, as loading a model does."""
        return _diagnose()

    def left_to_mlx(self, path: Path) -> dict[str, str | None]:
        """For every switch layer of a model why our kernels do not compute it, or None."""
        from flash_moe.measure.coverage import left_to_mlx

        return left_to_mlx(path)

    def disk(self, path: Path, experts: int | None = None) -> Disk:
        """What the disk of a model gives, in a second or some."""
        from flash_moe.measure.disk import measure_disk

        return measure_disk(path, experts)

    @staticmethod
    def place(folder: Path, record_bytes: int) -> float | None:
        """Bytes a second that the disk of a folder gives for records of such a size."""
        from flash_moe.measure.disk import measure_place

        return measure_place(folder, record_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _diagnose() -> Diagnosis:
    backends, machine, mlx = find_backends(), inspect_machine(), _version()
    broken: tuple[str, ...] = (backends.problem,) if backends.problem else ()
    try:
        from flash_moe.kernels.runtime import choose_runtime
    except ImportError as error:
        why = f"MLX cannot be loaded: {error}"
        broken = broken or (mend_import(str(error), mlx, backends),)
        return Diagnosis(None, why, (), broken, False, mlx, None, backends, None, "", machine)
    runtime = choose_runtime()
    on_gpu = runtime.name in ("metal", "cuda")
    native = _native() if runtime.name == "native" else None
    reader, no_reader = _reader()
    advice = (
        None if on_gpu or broken else gpu_advice(mlx, backends),
        runtime.faster or no_reader,
        MOVE_CACHE if native and not native.kept else None,
    )
    return Diagnosis(
        runtime=runtime.name,
        why=runtime.why,
        faster=tuple(text for text in advice if text),
        broken=broken,
        widen=runtime.widen,
        mlx=mlx,
        device="GPU" if on_gpu else "CPU",
        backends=backends,
        native=native,
        reader=reader,
        machine=machine,
    )


def _native() -> NativeKernel:
    from flash_moe.kernels.native import load_native
    from flash_moe.native.build import cache_folder, find_compiler
    from flash_moe.native.shipped import is_shipped

    native = load_native()
    file, folder, shipped = str(native.file), cache_folder(), is_shipped(native.file)
    kept = shipped or (folder is not None and file.startswith(f"{folder}/"))
    compiler = None if shipped else find_compiler()
    return NativeKernel(native.simd, native.threads, compiler, file, kept)


def _reader() -> tuple[str, str | None]:
    """What reads experts, and why that is not the native reader."""
    from flash_moe.errors import NativeUnavailable
    from flash_moe.stream.native_reader import load_native_reader

    try:
        load_native_reader()
    except NativeUnavailable as error:
        return "Python", str(error)
    return "native", None


def _version() -> str | None:
    try:
        return version("mlx")
    except PackageNotFoundError:
        return None
