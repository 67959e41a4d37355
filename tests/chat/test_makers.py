"""What a model's makers say of sampling is what happens where the user says nothing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import Engine, Request
from flash_moe.chat.makers import completed, makers_sampling
from flash_moe.options import Sampling

MAKERS = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "eos_token_id": 2}

samplings = st.builds(
    Sampling,
    temperature=st.none() | st.floats(0, 2),
    top_p=st.none() | st.floats(0, 1),
    top_k=st.none() | st.integers(0, 100),
    seed=st.none() | st.integers(0, 9),
)


@given(samplings, samplings)
def test_what_is_asked_for_comes_first(asked: Sampling, makers: Sampling) -> None:
    used = completed(asked, makers)
    for field in fields(Sampling):
        mine, theirs = getattr(asked, field.name), getattr(makers, field.name)
        assert getattr(used, field.name) == (theirs if mine is None else mine)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, Sampling()),
        ({"eos_token_id": [1, 2]}, Sampling()),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"temperature": 0.6}, Sampling(temperature=0.6)),
        ({"top_p": 0.9}, Sampling()),
        ({"repetition_penalty": 1.05}, Sampling(repetition_penalty=1.05)),
        (MAKERS, Sampling(temperature=0.9, top_k=40, top_p=0.95)),
        (
            {"do_sample": True, "temperature": "hot", "top_k": -1, "top_p": 0.5, "min_p": None},
            Sampling(temperature=1.0, top_p=0.5),
        ),
    ],
)
def test_what_they_say(tmp_path: Path, said: dict[str, Any], meant: Sampling) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert makers_sampling(tmp_path) == meant


def test_without_the_file_it_is_greedy(tmp_path: Path) -> None:
    assert makers_sampling(tmp_path) == Sampling()


@pytest.fixture(scope="module")
def engine(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("makers") / "model"
    copytree(demo_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps(MAKERS))
    engine = Engine.load(folder, prefix=None)
    yield engine
    engine.close()


def reply(engine: Engine, **options: Any) -> tuple[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    made = engine.reply(Request(messages=messages, max_tokens=12, **options))
    return "".join(made), made.stats


def test_a_reply_is_made_as_they_say(engine: Engine) -> None:
    text, stats = reply(engine, seed=3)
    said = {"temperature": 0.9, "top_p": 0.95, "top_k": 40}
    assert stats.sampling == {**said, "seed": 3}
    assert text == reply(engine, seed=3, **said)[0]
    assert text != reply(engine, seed=4)[0]
    assert not stats.warning


def test_temperature_0_is_one_option_away(engine: Engine) -> None:
    texts = {reply(engine, temperature=0, seed=seed)[0] for seed in range(3)}
    assert len(texts) == 1
    text, stats = reply(engine, temperature=0, top_p=0.5, top_k=3)
    assert {text} == texts
    assert stats.sampling == {"temperature": 0}
    assert "top_p and top_k had no effect" in stats.warning
