"""Compiles the libraries in C into a wheel, one file for each kind of processor.

hatchling runs this when it builds a wheel, also of the one that pip makes to install from source.
Without a C compiler the wheel is pure and runs everywhere; with one, it is for this system.
FLASH_MOE_PURE=1 asks for the pure one. An editable installation compiles at its first use, as ever.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

sys.path.insert(0, str(Path(__file__).parent))
from flash_moe.native.build import find_compiler
from flash_moe.native.libraries import ALL, FLAGS, Library, Variant, file_name, variants

# Of macOS, what MLX's own wheels need.
OLDEST_MACOS = "14.0"


class NativeLibraries(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        compiler = find_compiler()
        if version == "editable" or self.target_name != "wheel" or os.environ.get("FLASH_MOE_PURE"):
            return
        # For another machine: CC, _PYTHON_HOST_PLATFORM and this, as cross-compilers are used.
        machine = os.environ.get("FLASH_MOE_MACHINE", platform.machine())
        jobs = [(library, variant) for library in ALL for variant in variants(library, machine)]
        if compiler is None or not jobs:
            self.app.display_warning(
                "No C compiler was found, so this wheel has no compiled kernels. It looks for a "
                "compiler when it is first used, and computes with MLX if there is none."
            )
            return
        self._folder = Path(tempfile.mkdtemp(prefix="flash-moe-wheel-"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = list(pool.map(lambda job: self._compile(compiler, *job), jobs))
        if all(files):
            into = "flash_moe/native/built"
            build_data["force_include"] |= {
                str(file): f"{into}/{file.name}" for file in files if file
            }
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform(machine)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if folder := getattr(self, "_folder", None):
            shutil.rmtree(folder, ignore_errors=True)

    def _compile(self, compiler: str, library: Library, variant: Variant) -> Path | None:
        """In its folder by relative names, so that the same source gives the same bytes."""
        name = file_name(library, variant)
        command = [compiler, *FLAGS, "-s" if sys.platform == "linux" else "-Wl,-S", *variant.flags]
        command += [str(library.sources[0]), "-o", name, "-lm"]
        oldest = {"MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS, **os.environ}
        done = subprocess.run(
            command, cwd=self._folder, env=oldest, capture_output=True, text=True, check=False
        )
        if done.returncode:
            self.app.display_warning(f"{compiler} does not compile {name}: {done.stderr[-2000:]}")
            return None
        return self._folder / name


def _platform(machine: str) -> str:
    if sys.platform == "darwin":
        major = os.environ.get("MACOSX_DEPLOYMENT_TARGET", OLDEST_MACOS).split(".")[0]
        return f"macosx_{major}_0_{machine}"
    # The most demanding one that is true here: this system's C library is what we linked to.
    tags = [tag for tag in platform_tags() if tag.startswith(("manylinux", "musllinux"))]
    return (tags or list(platform_tags()))[0].replace(platform.machine(), machine)
