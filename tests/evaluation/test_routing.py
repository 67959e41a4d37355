"""How often each expert is chosen, against mlx-lm's own router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from flash_moe.engine import Engine
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.routing import Routing, RoutingCounter, entropy
from flash_moe.options import Settings
from tests.evaluation.measuring import documents_of, measured


def test_only_predictions_are_counted(engine: Engine, data: Path) -> None:
    """Every token that goes through the model once, and nothing of the model's own replies."""
    held_out = read_held_out(data)
    routing = measured(engine, held_out).routing
    tokens = sum(len(engine.tokenizer.encode(text.text)) - 1 for text in held_out.texts)
    for document in documents_of(engine, read_held_out(data, ["questions", "json", "tools"])):
        (ids,) = document.pieces
        tokens += len(ids) - 1
    k = engine.model.plan.experts_per_token
    assert [int(layer.counts.sum()) for layer in routing.layers] == [tokens * k] * 4
    assert engine.model.streamer.observer is None


@pytest.mark.parametrize("runtime", ["mlx", "auto"])
def test_counts_are_what_the_gates_choose(runtime: str, demo_folder: Path) -> None:
    resident, _ = load_model(demo_folder)
    tokens = mx.array([[7, 300, 12, 45, 500]])
    block = resident.language_model.model.layers[0].mlp
    seen: list[mx.array] = []
    switch = block.switch_mlp

    def observed(x: mx.array, indices: mx.array) -> Any:
        seen.append(indices)
        return switch(x, indices)

    block.switch_mlp = observed
    mx.eval(resident(tokens))
    expected = np.bincount(np.array(seen[0]).reshape(-1), minlength=8)
    engine = Engine.load(demo_folder, Settings(runtime=runtime), prefix=None)
    streamer = engine.model.streamer
    counter = RoutingCounter(streamer)
    with counter.counting():
        mx.eval(engine.model(tokens))
    mx.eval(engine.model(tokens))
    routing = Routing.from_row(streamer.store.layers, counter.row())
    assert routing.layers[0].counts.tolist() == expected.tolist()
    engine.close()


def test_entropy() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(2)
    assert entropy(np.array([7, 0, 0])) == 0
    assert entropy(np.array([0, 0])) == 0
