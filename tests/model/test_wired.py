"""What a Mac is told to keep in memory. The limit is MLX's; there is none elsewhere."""

from __future__ import annotations

import mlx.core as mx
import pytest

from flash_moe.model import wired

SMALL, LARGE = 1 << 27, 1 << 29


@pytest.mark.parametrize("most", [1 << 28, 1 << 40])
def test_weights_and_bank_of_all_models_are_wired(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [7]

    def set_limit(nbytes: int) -> int:
        limits.append(nbytes)
        return limits[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {"max_recommended_working_set_size": most})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    first, second = wired.wire(SMALL), wired.wire(LARGE)
    assert limits[-1] == min(SMALL + LARGE + wired.ROOM, most)
    first()
    assert limits[-1] == min(LARGE + wired.ROOM, most)
    second()
    assert limits[-1] == 7
    again = wired.wire(SMALL)
    again()
    again()
    assert limits[-1] == 7


def test_nothing_is_wired_elsewhere() -> None:
    if mx.metal.is_available():
        pytest.skip("this is a Mac")
    wired.wire(1 << 50)()
    assert not wired._wired
