"""The native kernels read and write nothing outside of their arguments."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flash_moe.kernels.native import Native
from flash_moe.kernels.spec import BITS, FULL
from flash_moe.kernels.structs import RESIDENT_BITS, resident
from flash_moe.native.build import find_compiler
from tests.kernels import reference as ref
from tests.kernels.native_cases import as_resident, random_matrix, within
from tests.kernels.planes import split_record, split_spec


class Guarded:
    """Bytes that end where memory does."""

    def __init__(self, data: np.ndarray) -> None:
        page = mmap.PAGESIZE
        size = -(-data.nbytes // page) * page
        self.memory = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert libc.mprotect(start + size, page, 0) == 0
        pages = np.frombuffer(self.memory, np.uint8, count=size)
        view = pages[size - data.nbytes :]
        view[:] = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.array = view.view(data.dtype).reshape(data.shape)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("last", ["weight", "scales", "biases"])
def test_nothing_beyond_a_record_is_read(native: Native, bits: int, last: str) -> None:
    """Each part in turn is what ends at a page that nobody may touch."""
    spec = ref.make_spec(32, 32, bits, 32, "float16")
    rng = np.random.default_rng(bits)
    record = ref.random_record(spec, rng)
    size = 32 * 4 * bits if last == "weight" else 64
    end = getattr(spec.down, last) + size
    moved = spec.stride
    longer = np.concatenate([record, record[end - size : end]])
    spec = replace(spec, down=replace(spec.down, **{last: moved}), stride=moved + size)
    guarded = Guarded(longer)
    for tokens in (1, 2, 3, 4):
        x = Guarded(rng.normal(size=(tokens, 32)).astype(np.float32)).array
        slots = Guarded(np.zeros((tokens, 1), np.uint32)).array
        got = native.experts(spec, memoryview(guarded.array), x, slots)
        want = ref.expert(longer, spec, x.astype(np.float64))
        assert within(got[:, 0], want)


@pytest.mark.parametrize("last", ["weight", "scales", "biases"])
def test_nothing_beyond_a_second_plane_is_read(native: Native, last: str) -> None:
    rng = np.random.default_rng(1)
    spec = split_spec(32, 32, 32, "float16")
    record = split_record(spec, rng, ref.Scales())
    second, size = spec.down.second, 32 * 8 if last == "weight" else 64
    assert second is not None
    start = getattr(second, last)
    longer = np.concatenate([record, record[start : start + size]])
    moved = replace(spec.down, second=replace(second, **{last: spec.stride}))
    there = replace(spec, down=moved, stride=spec.stride + size)
    guarded = memoryview(Guarded(longer).array)
    for tokens in (1, 2, 3, 4):
        x = rng.normal(size=(tokens, 32)).astype(np.float32)
        slots = np.full((tokens, 1), FULL, np.uint32)
        want = native.experts(spec, memoryview(record), x, slots)
        assert np.array_equal(native.experts(there, guarded, x, slots), want)


@pytest.mark.parametrize("bits", RESIDENT_BITS)
def test_nothing_beyond_a_resident_matrix_is_read(native: Native, bits: int) -> None:
    rng = np.random.default_rng(bits)
    matrix, record = random_matrix(7, 96, bits, 32, "bfloat16", rng)
    plain = as_resident(matrix, record)
    guarded = resident(*(Guarded(a).array for a in plain.arrays), bits=bits, group_size=32)
    x = rng.normal(size=(5, 96)).astype(np.float32)
    assert np.array_equal(
        native.matmul(guarded, Guarded(x).array), native.matmul(plain, x), equal_nan=True
    )


def test_arguments_are_checked(best: Native) -> None:
    spec = ref.make_spec(64, 32, 4, 32)
    bank = np.zeros(2 * spec.stride, np.uint8)
    x, slots = np.zeros((2, 64), np.float32), np.zeros((2, 3), np.uint32)
    weights = np.zeros((2, 3), np.float32)
    good: dict[str, Any] = {"spec": spec, "records": memoryview(bank), "x": x, "slots": slots}
    assert best.experts(**good, weights=weights).shape == (2, 64)
    bad: list[dict[str, Any]] = [
        {"x": x.astype(np.float64)},
        {"x": x[:1]},
        {"x": x[:, :32]},
        {"x": x.tolist()},
        {"slots": slots.astype(np.int64)},
        {"slots": slots[0]},
        {"slots": slots + np.uint32(2)},
        {"slots": slots + np.uint32(2**32 - 1)},
        {"records": memoryview(bank[:64])},
        {"weights": weights[:, :2]},
        {"weights": weights.astype(np.float16)},
        {"spec": replace(spec, stride=64)},
        {"spec": replace(spec, down=replace(spec.down, rows=32))},
        {"spec": replace(spec, down=spec.gate)},
        {"spec": replace(spec, up=replace(spec.up, bits=7))},
        {"spec": replace(spec, gate=replace(spec.gate, weight=-64))},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=r"."):
            best.experts(**{**good, **change})
    for threads in (0, -1, 100_000):
        with pytest.raises(ValueError, match="threads"):
            best.threads = threads
    for k in (0, 4):
        with pytest.raises(ValueError, match="experts"):
            best.router(weights, k, True)
    with pytest.raises(ValueError, match="shape"):
        resident(x.view(np.uint32), weights, weights, bits=4, group_size=32)


def test_strided_and_empty_arrays(best: Native) -> None:
    spec = ref.make_spec(64, 32, 4, 32)
    rng = np.random.default_rng(0)
    bank = memoryview(ref.random_record(spec, rng))
    x = np.asfortranarray(rng.normal(size=(3, 64)).astype(np.float32))
    slots = np.zeros((3, 1), np.uint32)
    same = best.experts(spec, bank, np.ascontiguousarray(x), slots)
    assert np.array_equal(best.experts(spec, bank, x, slots), same)
    nothing = best.experts(spec, bank, x[:0], slots[:0])
    assert nothing.shape == (0, 1, 64)
    none = np.zeros((3, 0))
    summed = best.experts(spec, bank, x, none.astype(np.uint32), none.astype(np.float32))
    assert np.array_equal(summed, np.zeros_like(x))


SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CLEAN = """
import sys; sys.path[:0] = sys.argv[1:]
import numpy as np
from flash_moe.kernels.native import load_native
from flash_moe.kernels.structs import resident
from tests.kernels import planes, reference as ref
native = load_native(SANITIZERS)
native.threads = 3
rng = np.random.default_rng(0)
for bits in (2, 3, 4, 8):
    spec = ref.make_spec(96, 160, bits, 32, "float16")
    bank = np.concatenate([ref.random_record(spec, rng) for _ in range(3)])
    for tokens in (1, 7):
        x = rng.normal(size=(tokens, 96)).astype(np.float32)
        slots = rng.integers(0, 3, (tokens, 3), np.uint32)
        each = native.experts(spec, memoryview(bank), x, slots)
        ones = np.ones(slots.shape, np.float32)
        summed = native.experts(spec, memoryview(bank), x, slots, ones)
        assert np.allclose(each.sum(1), summed, rtol=1e-3, atol=1e-3 * np.abs(each).max())
split = planes.make_planes(planes.split_spec(96, 160, 32, "float16"), 3, rng)
bank = memoryview(np.concatenate(split.bank))
for tokens in (1, 7):
    x = rng.normal(size=(tokens, 96)).astype(np.float32)
    slots = planes.mark_some(rng.integers(0, 3, (tokens, 3), np.uint32), rng)
    assert np.isfinite(native.experts(split.spec, bank, x, slots)).all()
for bits in (3, 5, 6):
    half = np.ones((7, 3), np.uint16)
    weight = np.zeros((7, 3 * bits), np.uint32)
    matrix = resident(weight, half, half, bits=bits, group_size=32)
    native.matmul(matrix, np.ones((5, 96), np.float32))
native.router(rng.normal(size=(40, 65)).astype(np.float32), 10, True)
print("clean")
"""


def preloaded(library: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"},
        check=False,
    )


@pytest.fixture
def address_sanitizer(tmp_path: Path) -> str:
    """The compiler's library of AddressSanitizer, after a trial: not every machine has one that
    runs."""
    compiler = find_compiler()
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")

    def ask(*flags: str) -> str:
        done = subprocess.run([compiler, *flags], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    library = ask("-print-file-name=libasan.so")
    if not Path(library).is_absolute() or "clang" in ask("--version"):
        pytest.skip(f"{compiler} has no libasan.so of its own")
    source, trial = tmp_path / "trial.c", tmp_path / "trial.so"
    source.write_text("int trial(int n) { return n + 1; }")
    ask(*SANITIZERS, "-shared", "-fPIC", str(source), "-o", str(trial))
    done = preloaded(library, "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(trial))
    if done.returncode:
        pytest.skip(f"AddressSanitizer does not run here: {done.stderr[-200:]}")
    return library


def test_sanitizers_find_nothing(cache_home: Path, address_sanitizer: str) -> None:
    """Every width, both ways to sum, odd sizes, in a process that stops at the first finding."""
    root = Path(__file__).parents[2]
    code = f"SANITIZERS = {SANITIZERS!r}\n{CLEAN}"
    done = preloaded(address_sanitizer, code, str(root / "backend"), str(root))
    assert done.stdout == "clean\n", done.stderr[-2000:]
