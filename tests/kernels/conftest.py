"""The native kernels as tests have them: every SIMD path of this processor, and no user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flash_moe.kernels.native import Native, load_native
from flash_moe.native.build import find_compiler

# -march=native gives the first; the flags take away what the next would use.
VARIANTS: dict[str, tuple[str, ...]] = {
    "best": (),
    "no AVX-512": ("-mno-avx512f",),
    "no AVX": ("-mno-avx512f", "-mno-avx2", "-mno-fma", "-mno-avx", "-mno-bmi2"),
}
X86 = os.uname().machine == "x86_64"


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test leaves anything in the user's cache."""
    if find_compiler() is None:
        pytest.skip("no C compiler")
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        load_native.cache_clear()
        yield home
    load_native.cache_clear()


@pytest.fixture(params=VARIANTS if X86 else ["best"])
def native(request: pytest.FixtureRequest, cache_home: Path) -> Iterator[Native]:
    yield from _as_it_was(load_native(VARIANTS[request.param]))


@pytest.fixture
def best(cache_home: Path) -> Iterator[Native]:
    yield from _as_it_was(load_native())


def _as_it_was(native: Native) -> Iterator[Native]:
    """A library and its threads are shared by all tests of a process."""
    threads = native.threads
    yield native
    native.threads = threads
