"""What a Mac is told to keep in memory. The limit is MLX's; there is none elsewhere."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe.model import wired
from flash_moe.model.load import load
from flash_moe.options import Settings


@pytest.mark.parametrize("most", [1 << 28, 1 << 40])
def test_weights_and_bank_are_wired_while_a_model_is_loaded(
    demo_folder: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = [7]

    def set_limit(nbytes: int) -> int:
        limit.append(nbytes)
        return limit[-2]

    with monkeypatch.context() as patch:
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx, "device_info", lambda _: {"max_recommended_working_set_size": most})
        patch.setattr(mx, "set_wired_limit", set_limit)
        unwire = wired.wire(1 << 27)
    assert limit[-1] == min((1 << 27) + wired.ROOM, most)
    unwire()
    assert limit[-1] == 7


def test_nothing_is_wired_elsewhere(demo_folder: Path) -> None:
    if mx.metal.is_available():
        pytest.skip("this is a Mac")
    assert wired.wire(1 << 50)() is None
    model = load(demo_folder, Settings(runtime="mlx"))
    model.close()
