"""Each thing that the emulator reports, on the smallest kernel that does it, beside one that does
not. Where a detector is known to be blind, that is here too: it says which of them is needed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal import compiler
from tests.metal.compiler import Build
from tests.metal.emulator import Array, EmulatorError, Guard, KernelCall, emulated, needs_clang, run
from tests.metal.small import one_kernel

pytestmark = needs_clang

LINE = mx.zeros((1024,))  # 4096 bytes: ends where a page does
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LANE = "uint lane = thread_index_in_simdgroup; uint i = thread_position_in_grid.x;"


def two_groups(body: str, threads: int = 64) -> KernelCall:
    return one_kernel(
        *(f"{LANE} {body}", [LINE], [(64,)]),
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )


def start(call: KernelCall, build: Build = "plain", **options: object) -> list[Array]:
    arrays = [np.arange(1024, dtype=np.float32)] * len(call.inputs)
    return run(call, arrays, build=build, **options)  # type: ignore[arg-type]


def report(call: KernelCall, build: Build = "plain", **options: object) -> EmulatorError:
    with pytest.raises(EmulatorError) as error:
        start(call, build, **options)
    return error.value


# -- lanes that part -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("float v = 0.0f; if (lane < 16u) { v = simd_sum(a[i]); } y[i] = v;", "have returned"),
        (
            "float v = 0.0f; if (lane < 16u) { v = simd_sum(a[i]); }\n y[i] = simd_sum(v);",
            "different simdgroup operations",
        ),
        (
            "float v; if (lane < 16u) { v = simd_sum(a[i]); }\n else { v = simd_sum(-a[i]); }",
            "different simdgroup operations",
        ),
        ("if (lane == 3u) return; y[i] = simd_sum(a[i]);", "have returned"),
        (
            "for (uint n = 0; n < lane; n++) y[i] = simd_sum(a[i]);",
            "have returned",
        ),
        (
            "if (lane < 4u) { y[i] = simd_sum(a[i]); } else { " + BARRIER + " }",
            "others at a barrier",
        ),
        ("if (lane == 0u) { " + BARRIER + " } y[i] = 1.0f;", "some threads have returned"),
        ("if (i == 40u) return; " + BARRIER + " y[i] = 1.0f;", "some threads have returned"),
        (
            f"if (i < 32u) {{ {BARRIER} }}\n else {{ {BARRIER} }} y[i] = 1.0f;",
            "different threadgroup barriers",
        ),
    ],
)
def test_divergence(body: str, message: str, schedule: int) -> None:
    error = report(two_groups(body), schedule=schedule)
    assert message in str(error)
    assert "threadgroup 0,0,0 thread" in str(error)


def test_divergence_says_where() -> None:
    call = two_groups("\n\nif (lane == 3u) return;\n y[i] = simd_sum(a[i]);")
    lines = call.source.splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "simd_sum" in text)
    assert f"at line {line} " in str(report(call))


def test_uniform_control_flow_is_no_divergence() -> None:
    body = f"if (i >= 32u) {{ float v = simd_sum(a[i]); y[i] = v; }} {BARRIER} y[i] = 1.0f;"
    for schedule in (0, 1, 2):
        start(two_groups(body), schedule=schedule)


@pytest.mark.parametrize(
    ("floats", "threads", "message"),
    [(8192, 1024, None), (8193, 32, "32768 bytes"), (1, 1025, "1024 threads")],
)
def test_limits(floats: int, threads: int, message: str | None) -> None:
    call = two_groups(f"threadgroup float t[{floats}]; t[lane] = a[lane]; y[0] = t[7];", threads)
    if message:
        assert message in str(report(call))
    else:
        start(call)


# -- accesses outside of buffers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "guard", "message"),
    [
        ("y[0] = a[1024 + lane];", "end", "bytes past `a`"),
        ("y[0] = a[1024 + 4096];", "end", "bytes past `a`"),
        ("y[0] = a[-1];", "start", "4 bytes before `a`"),
        ("y[64 + lane] = 0.0f;", "end", "bytes past `y`"),
        ("y[-1] = 0.0f;", "start", "4 bytes before `y`"),
        ("((device float*)(ulong)(&a[0]))[lane] = 1.0f;", "end", "write to `a`"),
        ("y[64] = 0.0f;", "middle", "canary: a write outside of `y`"),
        ("y[-1] = 0.0f;", "middle", "canary: a write outside of `y`"),
        ("y[64] = 0.0f;", "start", "canary: a write outside of `y`"),
        ("y[-1] = 0.0f;", "end", "canary: a write outside of `y`"),
        ("y[0] = *(const device float*)0;", "end", "no buffer at all"),
    ],
)
def test_guards(body: str, guard: Guard, message: str) -> None:
    error = report(two_groups(body), guard=guard)
    assert message in str(error)
    assert error.kind == message.split(":")[0] if ":" in message else error.kind == "guard"


def test_a_full_stack_is_an_error() -> None:
    body = """thread float big[200000]; big[uint(a[lane])] = 1.0f;
      for (uint n = 0; n < 200000u; n += 64) big[n] += a[n & 1023u]; y[lane] = big[7];"""
    assert report(two_groups(body)).kind == "guard"


def test_guards_let_pass_what_is_right() -> None:
    body = "y[63] = a[1023]; y[0] = a[0]; ((device float4*)y)[1] = ((const device float4*)a)[255];"
    for guard in ("end", "start", "middle"):
        start(two_groups(body), guard=guard)


def test_forbidden_ranges() -> None:
    """What is read and not used only ASan sees."""
    used, spared = two_groups("y[lane] = a[lane + 31];"), two_groups("y[lane] = a[lane];")
    idle = two_groups("simd_sum(a[lane + 31]); y[lane] = 1.0f;")
    forbidden = {"a": [(4 * 32, 4096)]}
    assert report(used, forbidden=forbidden).kind == "forbidden"
    assert report(used, "asan", forbidden=forbidden).kind == "use-after-poison"
    assert report(idle, "asan", forbidden=forbidden).kind == "use-after-poison"
    start(idle, forbidden=forbidden)
    for build in ("plain", "asan"):
        start(spared, build, forbidden=forbidden)


# -- sanitizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y[0] = a[1024];", "heap-buffer-overflow"),
        ("y[64] = 0.0f;", "heap-buffer-overflow"),
        ("threadgroup float t[4]; t[lane & 7u] = 1.0f; y[0] = t[0];", "index 4 out of bounds"),
        ("thread float t[4] = {}; y[0] = t[lane & 7u];", "index 4 out of bounds"),
        ("y[0] = *(const device float*)((const device uchar*)a + 2);", "load of misaligned"),
        ("y[0] = float(1 << int(a[33]));", "shift exponent 33"),
        ("y[0] = float(uint(-a[3]));", "-3 is outside the range"),
        ("if (lane == 3u) return; y[i] = simd_sum(a[i]);", "have returned"),
    ],
)
def test_address_and_undefined_behaviour_sanitizer(body: str, message: str) -> None:
    assert message in str(report(two_groups(body), "asan"))


EXCHANGE = "threadgroup float t[64]; t[i] = a[i];"
RACES = [
    ("no barrier", f"{EXCHANGE} y[i] = t[63u - i];", True),
    ("a barrier", f"{EXCHANGE} {BARRIER} y[i] = t[63u - i];", False),
    ("of one simdgroup", f"{EXCHANGE} simdgroup{BARRIER[11:]} y[i] = t[63u - i];", True),
    ("and enough", f"{EXCHANGE} simdgroup{BARRIER[11:]} y[i] = t[i ^ 1u];", False),
    (
        "that orders no memory",
        f"{EXCHANGE} threadgroup_barrier(mem_flags::mem_none); y[i] = t[63u - i];",
        True,
    ),
    (
        "after the second barrier",
        f"{EXCHANGE} {BARRIER} float v = t[63u - i]; {BARRIER} t[i] = v; y[i] = t[63u - i];",
        True,
    ),
    (
        "after the third barrier",
        f"{EXCHANGE} {BARRIER} float v = t[63u - i]; {BARRIER} t[i] = v; {BARRIER}"
        f"y[i] = t[63u - i];",
        False,
    ),
    (
        "write after read",
        f"{EXCHANGE} {BARRIER} float v = t[63u - i]; t[i] = v; y[i] = v;",
        True,
    ),
    ("the same value by all", "y[3] = 1.0f;", True),
    ("a simdgroup operation orders nothing", f"{EXCHANGE} simd_sum(a[i]); y[i] = t[i ^ 1u];", True),
]


@pytest.mark.parametrize(
    ("body", "race"), [case[1:] for case in RACES], ids=[case[0] for case in RACES]
)
def test_thread_sanitizer(body: str, race: bool) -> None:
    for schedule in (0, 1, 2):
        if race:
            assert report(two_groups(body), "tsan", schedule=schedule).kind == "data race"
        else:
            start(two_groups(body), "tsan", schedule=schedule)


# -- schedules -----------------------------------------------------------------------------------


def test_schedules_tell_a_race_between_threadgroups() -> None:
    """ThreadSanitizer does not: threadgroups run one after the other, on the same memory."""
    body = "uint g = threadgroup_position_in_grid.x; if (lane == 0) y[g & 1u] = a[g];"
    call = one_kernel(f"{LANE} {body}", [LINE], [(8,)], grid=(256, 1, 1))
    outcomes = [start(call, schedule=s, seed=5)[0][:2].tolist() for s in (0, 1, 2)]
    assert outcomes[:2] == [[6, 7], [0, 1]]
    assert outcomes[2] not in outcomes[:2]
    assert start(call, schedule=2, seed=5)[0][:2].tolist() == outcomes[2]
    start(call, "tsan")


def test_schedules_tell_a_missing_barrier() -> None:
    """One of the extremes reads what is not written yet, and finds NaN."""
    call = two_groups(f"{EXCHANGE} y[i] = t[i ^ 32u];")
    assert [bool(np.isnan(start(call, schedule=s)[0]).any()) for s in (0, 1)] == [True, True]
    call = two_groups(f"{EXCHANGE} {BARRIER} y[i] = t[i ^ 32u];")
    assert len({start(call, schedule=s)[0].tobytes() for s in (0, 1, 2)}) == 1


# -- tools ---------------------------------------------------------------------------------------


def test_a_missing_tool_skips_but_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt install clang-19"):
        compiler.unavailable(compiler.NO_CLANG)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt install clang-19"):
        compiler.unavailable(compiler.NO_CLANG)


def test_compile_errors_are_reported() -> None:
    with pytest.raises(compiler.CompileError, match="nonsense"):
        start(two_groups("y[0] = nonsense;"))


def test_forbidden_names_must_exist() -> None:
    call = two_groups("y[lane] = a[lane];")
    with pytest.raises(ValueError, match="bnak"):
        start(call, forbidden={"bnak": [(0, 8)]})
    with pytest.raises(ValueError, match="bnak"), emulated(forbidden={"bnak": [(0, 8)]}):
        pass
