"""Would we notice? Bugs are planted in the text of our kernels, one at a time, and every one has to
be caught by the detectors that are named beside it. `pytest -s` prints the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.kernels import shaders
from tests.metal.compiler import Build
from tests.metal.emulator import EmulatorError, Guard, Ranges, emulated, needs_clang
from tests.metal.scenes import SCENES, Scene, down, down_combine, gate_up
from tests.metal.syntax import complaints

pytestmark = needs_clang

# A run may be wrong; may differ between schedules; may hit a guard or a canary; break a rule of
# the runtime; depend on forbidden bytes; or be stopped by a sanitizer.
DETECTORS = ("wrong", "schedules", "guard", "canary", "emulator", "forbidden", "asan", "tsan")


@dataclass(frozen=True, slots=True)
class Bug:
    name: str
    scene: str
    old: str
    new: str
    caught_by: str  # at least these
    file: str = ""  # the scene's own where empty

    @property
    def path(self) -> str:
        return self.file or f"{self.scene}.metal"


GATE_UP, DOWN, MIX = "expert_gate_up_swiglu", "expert_down", "expert_down_combine"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
COLUMN_GUARD = "if (IN % STEP != 0 && col >= IN) break;"
CLAMP = "metal::min(row0 + uint(r), uint(OUT - 1))"
DELTA, RAW, RULE, CONV = "gated_delta", "gated_delta, raw", "gated_delta.metal", "short_conv"
ROW = "row0 + uint(r)"
COMMON, GATE, PLANES = "moe_common.h", f"{GATE_UP}.metal", "gate and up of planes"

BUGS = [
    Bug("order of codes", GATE_UP, "TWO_PLANES>(v, i);", "TWO_PLANES>(v, i ^ 1);", "wrong", COMMON),
    Bug("x not scaled", GATE_UP, "if (BITS != 3) xs[i]", "if (false) xs[i]", "wrong", COMMON),
    Bug(
        *("bfloat16 halves", GATE_UP, "as_type<float>(w[i] << 16)", "as_type<float>(w[i])"),
        *("wrong", COMMON),
    ),
    Bug("group index", GATE_UP, "col / GROUP)", "col / (GROUP * 2))", "wrong"),
    Bug("forgot simd_sum", GATE_UP, "simd_sum(up[r][t])", "up[r][t]", "wrong"),
    Bug("wrong slot", GATE_UP, "ulong(slot)", "ulong(tile / 5u)", "wrong asan forbidden"),
    Bug("sign of exp", GATE_UP, "metal::exp(-g)", "metal::exp(g)", "wrong"),
    Bug("no column guard", GATE_UP, COLUMN_GUARD, "", "guard asan"),
    Bug("no row guard on store", GATE_UP, "row < uint(OUT) && ", "", "guard asan"),
    Bug("no row guard on read", GATE_UP, CLAMP, "row0 + uint(r)", "asan"),
    Bug("tile never full", GATE_UP, " && uint(t) < count", "", "guard asan"),
    Bug("all lanes store", GATE_UP, "lane == 0 && row", "row", "tsan"),
    Bug(
        *("misaligned cast", GATE_UP, "(const device S*)record + (full ? GRS"),
        *("(const device S*)((const device uchar*)record + 1) + (full ? GRS", "wrong asan"),
    ),
    Bug(
        *("simd_sum under if (lane < 16)", GATE_UP, "const float u = simd_sum(up[r][t]);"),
        *("float u = 0.0f; if (lane < 16u) u = simd_sum(up[r][t]);", "emulator asan tsan"),
    ),
    Bug("no row guard on store", DOWN, "row < uint(OUT) && ", "", "guard asan"),
    Bug("no row guard on read", DOWN, CLAMP, "row0 + uint(r)", "guard asan"),
    Bug("no column guard", DOWN, COLUMN_GUARD, "", "guard asan"),
    Bug("tile never full", DOWN, " && uint(t) < count", "", "guard asan"),
    Bug("all lanes store", DOWN, "lane == 0 && row", "row", "tsan"),
    Bug("past the packed buffer", DOWN, "ulong(slot) *", "ulong(slot + 1u) *", "guard asan"),
    Bug("wrong expert's h", DOWN, "ulong(first + metal", "ulong(metal", "wrong"),
    Bug("no row guard on store", MIX, "row0 + t < uint(OUT)", "true", "guard asan"),
    Bug("no row guard on read", MIX, CLAMP, "row0 + uint(r)", "guard asan"),
    Bug("no column guard", MIX, COLUMN_GUARD, "", "guard asan"),
    Bug("missing barrier", MIX, BARRIER, "", "wrong schedules tsan"),
    Bug("simdgroup barrier", MIX, BARRIER, f"simdgroup{BARRIER[11:]}", "wrong schedules tsan"),
    Bug("barrier of no memory", MIX, "mem_flags::mem_threadgroup", "mem_flags::mem_none", "tsan"),
    Bug(
        *("barrier under if (lane == 0)", MIX, BARRIER),
        *(f"if (lane == 0) {{ {BARRIER} }}", "emulator asan tsan"),
    ),
    Bug(
        *("early return", MIX, "const float weight"),
        *("if (row0 + lane >= uint(OUT)) return; const float weight", "emulator asan tsan"),
    ),
    Bug("threadgroup array too small", MIX, "part[K * ROWS]", "part[K * ROWS - 2]", "asan"),
    Bug("threadgroup array overrun", MIX, "e < K; e++) total", "e <= K; e++) total", "asan"),
    Bug("row overlap", MIX, "position_in_grid.y * uint(ROWS)", "position_in_grid.y * 4u", "wrong"),
    Bug("no row guard", "combine", "row < uint(OUT)", "true", "guard asan tsan"),
    Bug("place ignored", "combine", "ulong(place[pair])", "ulong(pair)", "wrong"),
    Bug("second plane misread", PLANES, "lo >> 2 &", "lo &", "wrong", COMMON),
    Bug("second plane used by all", PLANES, "low[i] & keep", "low[i]", "wrong", COMMON),
    Bug("codes not lined up", PLANES, "i % 16 / 2 * 4", "i % 16 * 4", "wrong", COMMON),
    Bug("first plane's scale for both", PLANES, "full ? GRS : GS", "GS", "wrong asan", GATE),
    # Read and not used: only ASan sees it.
    Bug("second plane read by all", PLANES, "full ? URW : UW", "true ? URW : UW", "asan", GATE),
    Bug("scale not divided", PLANES, "? 0.25f", "? 1.0f", "wrong", GATE),
    Bug("choice left in the slot", PLANES, "tiles[tile] & ~MOE_FULL", "tiles[tile]", "guard", GATE),
    Bug("ties to the highest", "router_topk", "v[i] > best", "v[i] >= best", "wrong"),
    Bug(
        "an expert too many",
        "router_topk",
        "lane < uint(KEEP)",
        "lane <= uint(KEEP)",
        "canary asan",
    ),
    Bug(
        "weights of the wrong ones", "router_topk", "KEEP) + lane] = R", "K) + lane] = R", "canary"
    ),
    Bug("no expert guard", "router_topk", "v[i] = e < uint(N) ?", "v[i] = true ?", "guard asan"),
    Bug(
        "no row guard on read", DELTA, "metal::min(row0 + uint(r), uint(DV - 1))", ROW, "guard asan"
    ),
    Bug("all lanes store", DELTA, f"lane == 0 && {ROW}", ROW, "tsan"),
    Bug("no row guard on store", DELTA, f"lane == 0 && {ROW} < uint(DV)", "lane == 0", "tsan"),
    Bug("forgot simd_sum", DELTA, "value - simd_sum(seen)", "value - seen", "wrong"),
    Bug("key of another head", DELTA, "head / uint(HEADS / KEY_HEADS)", "0u", "wrong"),
    Bug("state of the last token", DELTA, "s[r][i] *= decays[i];", "", "wrong"),
    Bug("a token too many", DELTA, "t < tokens; t++", "t <= tokens; t++", "guard asan"),
    Bug("lengths not taken", RAW, "ks[i] *= k_scale;", "", "wrong", RULE),
    Bug("sign of the rate", RAW, "-metal::exp(float(log", "metal::exp(float(log", "wrong", RULE),
    Bug("beta as it comes", RAW, "blend = 1.0f /", "if (false) blend = 1.0f /", "wrong", RULE),
    Bug("values with the keys", RAW, "uint(V0) + rows[r]", "uint(K0) + rows[r]", "wrong", RULE),
    Bug("no channel guard", CONV, "channel < uint(CHANNELS)", "true", "guard asan"),
    Bug("past forgotten", CONV, "row < uint(BEFORE) ? past", "false ? past", "guard asan"),
    Bug("a tap off", CONV, "row + uint(i);", "row + uint(i) + 1u;", "wrong guard asan"),
    Bug("silu of nothing", CONV, "sum / (1.0f", "1.0f / (1.0f", "wrong"),
]
SEEN: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    width = max(map(len, SEEN), default=0)
    print(f"\n{'planted bug':{width}} | {' | '.join(DETECTORS)}")
    for name, reports in SEEN.items():
        marks = " | ".join(("x" if d in reports else "").center(len(d)) for d in DETECTORS)
        print(f"{name:{width}} | {marks} {', '.join(sorted(set(reports.values()) - {'x'}))}")


def play(
    scene: Scene,
    build: Build = "plain",
    schedule: int = 0,
    guard: Guard = "end",
    forbidden: Ranges | None = None,
) -> list[mx.array]:
    shaders.kernel.cache_clear()
    try:
        with emulated(build=build, schedule=schedule, seed=1, guard=guard, forbidden=forbidden):
            return scene.launch()
    finally:
        shaders.kernel.cache_clear()


def detect(scene: Scene) -> dict[str, str]:
    """Which detectors report something, and what."""
    reports: dict[str, str] = {}
    outcomes: set[bytes] = set()
    for schedule in (0, 1, 2):
        for guard in ("end", "start"):
            try:
                outputs = play(scene, schedule=schedule, guard=guard)
            except EmulatorError as error:
                reports.setdefault(error.kind, "x")
                continue
            outcomes.add(b"".join(np.array(y).tobytes() for y in outputs))
            if not scene.right(outputs):
                reports["wrong"] = "x"
    if len(outcomes) > 1:
        reports["schedules"] = "x"
    builds: tuple[Build, ...] = ("plain", "asan", "tsan")
    for build in builds:
        try:
            play(scene, build, forbidden=scene.forbidden)
        except EmulatorError as error:
            if build != "plain":
                reports[build] = error.kind
            elif error.kind == "forbidden":
                reports["forbidden"] = "x"
    return reports


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.scene}: {bug.name}")
def test_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    original = shaders.text

    def text(name: str) -> str:
        source = original(name)
        if name != bug.path:
            return source
        assert source.count(bug.old) == 1, f"{bug.old!r} is not once in {name}: plant it elsewhere"
        return source.replace(bug.old, bug.new)

    text(bug.path)
    monkeypatch.setattr(shaders, "text", text)
    reports = SEEN[f"{bug.scene}: {bug.name}"] = detect(SCENES[bug.scene]())
    assert set(bug.caught_by.split()) <= set(reports), reports


@pytest.mark.parametrize("scene", SCENES)
def test_nothing_is_found_in_what_we_ship(scene: str) -> None:
    assert detect(SCENES[scene]()) == {}


@pytest.mark.parametrize("scene", [gate_up, down, down_combine])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_nothing_is_found_at_other_widths(scene: Callable[[int], Scene], bits: int) -> None:
    assert detect(scene(bits)) == {}


@pytest.mark.parametrize("scene", [down, down_combine])
def test_nothing_is_found_in_two_planes(scene: Callable[[int, bool], Scene]) -> None:
    assert detect(scene(2, True)) == {}


@pytest.mark.parametrize("scene", SCENES)
def test_what_we_ship_may_well_be_metal(scene: str) -> None:
    shaders.kernel.cache_clear()
    with emulated() as calls:
        SCENES[scene]().launch()
    shaders.kernel.cache_clear()
    assert [complaints(call) for call in calls] == [[]]
