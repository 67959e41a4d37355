"""What a user can do so that MLX runs, or runs on the GPU. Sentences, with commands in them."""

from __future__ import annotations

import platform
import shlex
import sys

from flash_moe.machine import Nvidia, find_nvidia, is_translated
from flash_moe.mlx_library import Backends

# What MLX's documentation asks for: the least driver of each wheel, and the least GPU of both.
CUDA_DRIVERS = {"cuda13": (580,), "cuda12": (550, 54, 14)}
CUDA_CAPABILITY = (7, 5)
PIP = f"{shlex.quote(sys.executable)} -m pip"


def mend_import(error: str, mlx: str | None, backends: Backends) -> str:
    """For an MLX that cannot be loaded, though its own library is the right one."""
    wanted = backends.wanted or ("mlx-metal" if sys.platform == "darwin" else "mlx-cpu")
    if "libcuda.so" in error:
        # The driver brings it; the CUDA wheel does not load without, not even for the CPU.
        return (
            "There is no NVIDIA driver here, and the MLX that is installed needs one. Install the "
            f"driver (580 or newer), or go back to the CPU: {PIP} uninstall -y {wanted} && "
            f"{PIP} install --force-reinstall --no-deps {_pinned('mlx-cpu', mlx)}"
        )
    return (
        f"Install MLX again: {PIP} install --force-reinstall "
        f"{_pinned('mlx', mlx)} {_pinned(wanted, mlx)}"
    )


def gpu_advice(mlx: str | None, backends: Backends) -> str | None:
    """Where MLX runs on the CPU: what brings it to a GPU. None: there is no GPU here."""
    if sys.platform != "darwin":
        return cuda_advice(find_nvidia(), backends.installed)
    if platform.machine() == "arm64":
        return (
            "MLX finds no Metal. It needs macOS 14 or newer, and a virtual machine may have none. "
            f"If it should be there, install it again: {PIP} install --force-reinstall --no-deps "
            f"{_pinned('mlx', mlx)} {_pinned('mlx-metal', mlx)}"
        )
    # MLX has no GPU back end for Intel Macs.
    rosetta = "This Python is made for Intel. Install llm with a Python for Apple Silicon (arm64)."
    return rosetta if is_translated() else None


def cuda_advice(gpu: Nvidia | None, installed: tuple[str, ...]) -> str | None:
    """The same for Linux, by the GPU that was found and the back ends that are installed."""
    wheels = [name for name in installed if name.startswith("mlx-cuda")]
    if gpu is None:
        if not wheels:
            return None
        return f"{wheels[-1]} is installed, but no NVIDIA GPU is found. See: nvidia-smi"
    if gpu.capability and gpu.capability < CUDA_CAPABILITY:
        return "The NVIDIA GPU is too old for MLX, which needs compute capability 7.5 (2018)."
    driver = ".".join(map(str, gpu.driver))
    usable = [extra for extra, least in CUDA_DRIVERS.items() if gpu.driver >= least]
    if not usable:
        return (
            f"The driver of the NVIDIA GPU, {driver}, is too old for MLX. Update it to 580 or "
            "newer, then: llm install 'llm-flash-moe[cuda13]'"
        )
    if fitting := [wheel for wheel in wheels if wheel.replace("mlx-cuda-", "cuda") in usable]:
        return (
            f"{fitting[-1]} is installed, but MLX does not see the NVIDIA GPU (driver {driver}). "
            "Is CUDA_VISIBLE_DEVICES set? Is the GPU in the list of nvidia-smi?"
        )
    return (
        f"There is an NVIDIA GPU (driver {driver}) that MLX does not use. Install its CUDA back "
        f"end: llm install 'llm-flash-moe[{usable[0]}]'"
    )


def _pinned(wheel: str, version: str | None) -> str:
    return f"{wheel}=={version}" if version else wheel
