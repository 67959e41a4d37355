"""What measuring costs, counted."""

from __future__ import annotations

from flash_moe.evaluation.cost import Cost


def test_costs_add_up() -> None:
    assert Cost().to_json()["expert_bytes_per_token"] is None
    one = Cost(tokens=5, seconds=0.5, expert_bytes=100)
    assert (Cost() + one + one).to_json() == {
        "tokens": 10,
        "seconds": 1.0,
        "tokens_per_second": 10.0,
        "expert_bytes": 200,
        "expert_bytes_per_token": 20.0,
    }
