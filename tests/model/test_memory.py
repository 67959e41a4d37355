"""Memory stays bounded however long the prompt is and however many experts there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_moe.pack.job import PackJob
from flash_moe.synth.model import Shape, synthesize

# 3.9 GB of experts; K=1 keeps the arithmetic of 2,000 tokens short on a slow CPU.
SHAPE = Shape(layers=4, experts=1100, experts_per_token=1, hidden=512, intermediate=512)
BANK = 32 << 20
# Of experts in the page cache, which has all of them here.
MAPPED = 64 << 20
# Python, MLX, mlx-lm and the tokenizer, more where MLX has CUDA's libraries; the rest is the state
# of 2,000 tokens.
LIBRARIES, STATE = 110e6, 290e6

# On the CPU: a GPU's driver takes more memory than what is measured here.
START = """
import json, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.engine import Engine
from flash_moe.options import Settings
from flash_moe.process import peak_memory
import mlx_lm.models.qwen3_5_moe, mlx_lm.utils
before = peak_memory()
"""
RUN = f"""{START}
settings = Settings(bank_bytes=int(sys.argv[2]), mapped_bytes={MAPPED})
engine = Engine.load(Path(sys.argv[1]), settings)
loaded = peak_memory()
request = TokenRequest(prompt=[i % 900 for i in range(2000)], max_tokens=8)
tokens = len(list(Generation(engine.model, request)))
print(json.dumps(dict(tokens=tokens, before=before, loaded=loaded, peak=peak_memory(),
                      **engine.plan.to_json())))
"""


def test_two_thousand_tokens_with_experts_of_eight_times_the_memory(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    synthesize(folder, SHAPE, bits=8)
    printed = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(BANK)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    run = json.loads(printed)
    weights = run["resident_bytes"] + run["bank_bytes"]
    allowed = weights + MAPPED + STATE + max(LIBRARIES, run["before"])
    print(
        f"experts {run['expert_bytes'] / 1e6:.0f} MB; resident + bank {weights / 1e6:.0f} MB; "
        f"peak {run['peak'] / 1e6:.0f} MB, {(run['peak'] - weights) / 1e6:.0f} MB beyond them"
    )
    assert run["tokens"] == 8
    assert run["expert_bytes"] >= 8 * (weights + STATE + LIBRARIES)
    assert run["peak"] <= allowed


# 0.4 GB resident, and few experts.
HEAVY = Shape(
    layers=4, experts=8, hidden=2048, intermediate=64, heads=32, linear_heads=32, vocabulary=65536
)
LOAD = f"""{START}
engine = Engine.load(Path(sys.argv[1]), Settings(bank_bytes=1))
print(json.dumps(dict(before=before, peak=peak_memory(), **engine.plan.to_json())))
"""


@pytest.mark.parametrize("form", ["in place", "pack"])
def test_loading_takes_little_more_than_what_stays(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "heavy"
    synthesize(folder, HEAVY, bits=8)
    if form == "pack":
        PackJob.plan(folder, tmp_path / "pack").write()
        folder = tmp_path / "pack"
    printed = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], check=True, capture_output=True, text=True
    ).stdout
    run = json.loads(printed)
    grown, resident = run["peak"] - run["before"], run["resident_bytes"] + run["bank_bytes"]
    print(f"{form}: resident and bank {resident / 1e6:.0f} MB, grown by {grown / 1e6:.0f} MB")
    assert run["resident_bytes"] > 300e6
    assert grown <= 1.1 * resident
