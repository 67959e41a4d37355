"""The 397B at full size, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_moe.synth.model import SHAPES, synthesize
from tests.devices import GPU

PLAN = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.plan import make_plan
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.process import peak_memory
import mlx_lm.models.qwen3_5_moe, mlx_lm.utils
before = peak_memory()
skeleton = open_skeleton(open_folder(Path(sys.argv[1])), experts=4)
layers = skeleton.layers()
plan = make_plan(skeleton)
seconds = time.perf_counter() - start
peak = peak_memory()
print(json.dumps({**plan.to_json(), "seconds": seconds, "before": before, "peak": peak}))
assert len(layers) == plan.layers
"""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """223 GB of headers and holes."""
    folder = tmp_path_factory.mktemp("flagship") / "397b"
    synthesize(folder, SHAPES["397b"], bits=4, dtype="bfloat16", sparse=True)
    return folder


def test_full_size_is_planned_from_headers(sparse: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", PLAN, str(sparse)], check=True, capture_output=True, text=True
    ).stdout
    plan = json.loads(printed)
    grown = plan["peak"] - plan["before"]
    print(
        f"planned in {plan['seconds']:.2f} s with {plan['peak'] / 1e6:.0f} MB, "
        f"{grown / 1e6:.0f} of them for the plan"
    )
    # The architecture's own numbers: 60 layers, 512 experts of 3 × 4096 × 1024 at 4.5 bits.
    assert (plan["layers"], plan["experts"]) == (60, 512)
    assert plan["record_bytes"] == 3 * 4096 * 1024 * 9 // 16 == 7_077_888
    assert plan["expert_bytes"] == 60 * 512 * 7_077_888
    assert plan["token_bytes"] == 60 * 4 * 7_077_888
    assert 5.4e9 < plan["resident_bytes"] < 5.7e9
    assert grown < 100e6
    # MLX's libraries for CUDA alone may take more.
    assert GPU or plan["peak"] < 200e6
