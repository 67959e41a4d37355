"""mlx-lm still has every name that we use, and each does what we rely on it to do.

When a version of mlx-lm breaks one of them, a test here fails by its name.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flash_moe import upstream
from flash_moe.built_in import BUILT_IN, NAME
from flash_moe.checkpoint.switches import parameters
from flash_moe.errors import Remedy, UnsupportedModel
from flash_moe.model.families import FAMILIES
from tests.architectures import random_model, write_checkpoint

ENGINE = Path(upstream.__file__).parent
EVERY_NAME = [(module, name) for module, names in upstream.NAMES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), EVERY_NAME, ids=[name for _, name in EVERY_NAME])
def test_mlx_lm_has(module: str, name: str) -> None:
    assert callable(upstream.get(module, name))


def test_a_missing_name_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"mlx_lm.utils": ("no_such_name",), "mlx_lm.no_such_module": ("Model",)}
    monkeypatch.setattr(upstream, "NAMES", gone)
    for module, (name,) in gone.items():
        with pytest.raises(UnsupportedModel, match=rf"has no {module}\.{name}, which"):
            upstream.get(module, name)
    with pytest.raises(UnsupportedModel, match="no parser 'no_such_parser'") as failure:
        upstream.tool_parser("no_such_parser")
    assert failure.value.remedy is Remedy.UPGRADE_MLX_LM


WITHOUT_TRANSFORMERS = """
import sys
from pathlib import Path
from flash_moe import upstream
for module, names in upstream.NAMES.items():
    upstream.get(module, names[0])
assert upstream.tool_parser_name("<tool_call>\\n<function=", dict) == "qwen3_coder"
assert "transformers" not in sys.modules
assert "mlx_lm.generate" not in sys.modules
assert "huggingface_hub.hf_api" not in sys.modules

import huggingface_hub, mlx_lm.utils
assert "snapshot_download" not in vars(huggingface_hub)
try:
    mlx_lm.utils.snapshot_download("nobody/nothing", local_files_only=True, cache_dir=sys.argv[2])
except huggingface_hub.errors.LocalEntryNotFoundError:
    pass
assert huggingface_hub.snapshot_download is not mlx_lm.utils.snapshot_download

assert "mlx_lm.tokenizer_utils" not in sys.modules
import mlx_lm
assert mlx_lm.load is mlx_lm.utils.load
assert mlx_lm.generate.__module__ == "mlx_lm.generate"
from mlx_lm.tokenizer_utils import TokenizerWrapper
assert sys.modules["mlx_lm.generate"].TokenizerWrapper is TokenizerWrapper
tokenizer = mlx_lm.utils.load_tokenizer(Path(sys.argv[1]))
assert type(tokenizer) is TokenizerWrapper
assert tokenizer.decode(tokenizer.encode("llama")) == "llama"
"""


def test_mlx_lm_is_imported_without_transformers(tmp_path: Path) -> None:
    """And is whole for whoever else wants it in the process."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(BUILT_IN[NAME]), str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_other_file_imports_mlx_lm() -> None:
    """Neither a name of it, nor one that is looked up by import_module."""
    offenders = [
        str(file.relative_to(ENGINE))
        for file in sorted(ENGINE.rglob("*.py"))
        if file.name != "upstream.py" and any(map(_is_mlx_lm, _imported(file)))
    ]
    assert offenders == []


def test_only_declared_names_are_looked_up() -> None:
    calls = [
        tuple(ast.literal_eval(argument) for argument in node.args)
        for file in ENGINE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("get", "upstream.get")
        and len(node.args) == 2
        and all(isinstance(argument, ast.Constant) for argument in node.args)
        and _is_mlx_lm(str(ast.literal_eval(node.args[0])))
    ]
    assert calls
    assert set(calls) <= set(EVERY_NAME)


def _imported(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
    return names


def _is_mlx_lm(module: str) -> bool:
    return module.split(".")[0] == "mlx_lm"


# -- building models ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(*random_model("qwen3_moe", bits=4), tmp_path / "model")
    return tmp_path / "model"


def test_load_model_is_lazy_and_takes_other_classes(checkpoint: Path) -> None:
    """It calls `sanitize` of the model that the other classes build, and reads no weight."""
    config = json.loads((checkpoint / "config.json").read_text())
    weights = checkpoint / "model.safetensors"
    sanitized: list[set[str]] = []

    def classes(config: dict[str, Any]) -> Any:
        model_class, args_class = upstream.model_classes(config)

        def build(args: Any) -> nn.Module:
            class Watched(model_class):  # type: ignore[misc,valid-type]
                def sanitize(self, weights: upstream.Weights) -> Any:
                    sanitized.append(set(weights))
                    return super().sanitize(weights)

            return Watched(args)

        return build, args_class

    before = mx.get_active_memory()
    model, loaded = upstream.load_model_lazily(checkpoint, config | {"rope_theta": 7.0}, classes)
    assert mx.get_active_memory() - before < weights.stat().st_size / 10
    assert sanitized == [set(mx.load(str(weights)))]
    assert loaded["rope_theta"] == 7.0
    layer = model.model.layers[0]
    assert type(layer.mlp.switch_mlp.gate_proj) in upstream.projection_types()
    assert layer.mlp.switch_mlp.gate_proj.bits == 4
    assert type(layer.self_attn.q_proj) is nn.Linear
    right: Any = mx.load(str(weights))
    assert all(mx.array_equal(array, right[name]) for name, array in parameters(model).items())
    assert mx.get_active_memory() - before > weights.stat().st_size / 2


def test_model_classes_know_architectures_by_their_type() -> None:
    model_class, args_class = upstream.model_classes({"model_type": "qwen3_5_moe"})
    assert model_class is upstream.get("mlx_lm.models.qwen3_5_moe", "Model")
    assert args_class is upstream.get("mlx_lm.models.qwen3_5_moe", "ModelArgs")
    with pytest.raises(ValueError, match="abacus"):
        upstream.model_classes({"model_type": "abacus"})


def test_infinities_in_a_config_survive_json(checkpoint: Path) -> None:
    """Packs hold configs; mlx-lm's loader must read what we write."""
    config = json.loads((checkpoint / "config.json").read_text())
    odd = config | {"limits": [math.inf, {"least": -math.inf}], "nan": math.nan, "plain": [1.5, 2]}
    text = json.dumps(upstream.encoded_config(odd), allow_nan=False)
    (checkpoint / "config.json").write_text(text)
    _, loaded = upstream.load_model_lazily(checkpoint, {}, upstream.model_classes)
    assert loaded["limits"] == [math.inf, {"least": -math.inf}]
    assert math.isnan(loaded["nan"])
    assert loaded["plain"] == [1.5, 2]


def test_contiguous_is_put_back_also_after_an_error() -> None:
    own, array = mx.contiguous, mx.zeros((2, 3)).swapaxes(0, 1)
    with upstream.without_contiguous():
        assert mx.contiguous(array) is array
        assert mx.contiguous(array, allow_col_major=True) is array
    assert mx.contiguous is own
    with pytest.raises(KeyError), upstream.without_contiguous():
        raise KeyError
    assert mx.contiguous is own


LIMITS = """
import resource, sys
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
own = resource.setrlimit
from flash_moe import upstream
for module, names in upstream.NAMES.items():
    upstream.get(module, names[0])
upstream.tool_parser("json_tools")
assert "mlx_lm.utils" in sys.modules
assert resource.setrlimit is own
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("limits", "after"),
    [
        ((3000, 3500), (3000, 3500)),
        ((2048, 2048), (2048, 2048)),
        ((256, 3500), (2048, 3500)),
        ((256, 1000), (1000, 1000)),
    ],
)
def test_limits_of_open_files_are_never_lowered(
    limits: tuple[int, int], after: tuple[int, int]
) -> None:
    """mlx_lm.utils would make them (2048, 4096), or fail where the hard one is lower."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < limits[1]:
        pytest.skip(f"this machine allows {hard} open files")
    done = subprocess.run(
        [sys.executable, "-c", LIMITS, *map(str, limits)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == [str(limit) for limit in after], done.stderr[-2000:]


# -- modules --------------------------------------------------------------------------------------


def test_switch_glu_applies_the_experts_that_indices_name(on_cpu: None) -> None:
    """(x [..., H], indices [..., k]) → [..., k, H], also where it sorts large batches."""
    switch_glu, swiglu = upstream.swiglu_types()
    switch = switch_glu(16, 8, 5)
    assert type(switch.activation) is swiglu
    assert list(switch.children()) == ["gate_proj", "up_proj", "down_proj", "activation"]
    for tokens in (3, 40):
        x = mx.random.normal((tokens, 16))
        ids = mx.random.randint(0, 5, (tokens, 2))
        gate, up, down = (
            switch[name].weight[ids] for name in ("gate_proj", "up_proj", "down_proj")
        )
        columns = x[:, None, :, None]
        inner = nn.silu(gate @ columns) * (up @ columns)
        expected = (down @ inner).squeeze(-1)
        got = switch(x, ids)
        assert got.shape == (tokens, 2, 16)
        assert mx.allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_switch_mlp_has_two_projections() -> None:
    _, switch_mlp = upstream.switch_types()
    plain, quantized = upstream.projection_types()
    switch = switch_mlp(64, 64, 3, bias=True)
    assert list(switch.children()) == ["fc1", "fc2", "activation"]
    assert {type(switch.fc1), type(switch.fc2)} == {plain}
    assert type(switch.fc1.to_quantized(group_size=32, bits=4, mode="affine")) is quantized
    assert {"weight", "scales", "biases", "bias"} <= set(
        switch.fc1.to_quantized(group_size=32, bits=4)
    )


def test_rows_with_a_bias_lie_as_their_strides_say(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's own do not while something else holds the product: no memory to add the bias in."""
    own, products = mx.gather_mm, []

    def gather_mm(*args: Any, **options: Any) -> mx.array:
        products.append(own(*args, **options))
        return products[-1]

    monkeypatch.setattr(mx, "gather_mm", gather_mm)
    x, ids = mx.random.normal((70, 1, 16)), mx.arange(70) // 9
    strides, rows = {}, []
    plain, biased = upstream.plain_projections()
    layer = plain(16, 24, 8, bias=True)
    layer["bias"] = mx.random.normal((8, 24))
    for kind in (plain, biased):
        layer.__class__ = kind
        rows.append(layer(x, ids, sorted_indices=True))
        mx.eval(rows)
        strides[kind] = memoryview(rows[-1]).strides  # type: ignore[arg-type]
    assert strides == {plain: (96, 4, 4), biased: (96, 96, 4)}
    assert mx.array_equal(*rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_have_the_parts_that_their_family_uses(family: Any) -> None:
    assert family.block_type in EVERY_NAME
    name = family.block_type[0].rpartition(".")[2]
    model, config = random_model(name)
    kind = upstream.get(*family.block_type)
    blocks = [module for _, module in model.named_modules() if type(module) is kind]
    assert blocks
    for block in blocks:
        assert block.norm_topk_prob is config["norm_topk_prob"]
        assert block.sharding_group is None
        assert type(block.gate) is nn.Linear
        assert type(block.switch_mlp) in upstream.switch_types()
        assert block.top_k == config["num_experts_per_tok"]
        # No module that the family does not compute.
        shared = {"shared_expert", "shared_expert_gate"} if name == "qwen3_next" else set()
        assert set(block.children()) == {"gate", "switch_mlp", *shared}


# -- running --------------------------------------------------------------------------------------


def test_a_kv_cache_shows_how_much_of_it_is_used() -> None:
    kv_cache, chunked = upstream.cache_types()
    for cache, start in ((kv_cache(), None), (chunked(8), 0)):
        assert (cache.keys, cache.values, cache.offset) == (None, None, 0)
        cache.update_and_fetch(mx.ones((1, 2, 5, 4)), mx.ones((1, 2, 5, 3)))
        assert cache.offset == 5
        assert cache.keys.shape[2] >= 5
        assert cache.values.shape[:3] == cache.keys.shape[:3]
        assert mx.array_equal(cache.keys[:, :, :5], mx.ones((1, 2, 5, 4)))
        assert getattr(cache, "start_position", None) == start


def test_a_chunked_kv_cache_moves_its_start() -> None:
    _, chunked = upstream.cache_types()
    cache = chunked(8)
    cache.update_and_fetch(mx.ones((1, 1, 12, 4)), mx.ones((1, 1, 12, 4)))
    cache.maybe_trim_front()
    assert (cache.offset, cache.start_position) == (12, 4)
    assert cache.keys.shape[2] == 8


def test_a_prompt_cache_has_an_object_for_every_layer() -> None:
    for name in ("qwen3_moe", "qwen3_next"):
        model, config = random_model(name)
        assert len(upstream.make_cache(model)) == config["num_hidden_layers"]


LIKELIEST = mx.log(mx.array([[0.5, 0.05, 0.3, 0.1, 0.05]]))


def tokens_left(filters: list[Any]) -> list[int]:
    """The tokens that filters leave, their log-probabilities unchanged."""
    logprobs = LIKELIEST
    for keep_likely in filters:
        logprobs = keep_likely(logprobs)
    finite = mx.isfinite(logprobs)[0]
    assert mx.array_equal(mx.where(finite, logprobs[0], 0), mx.where(finite, LIKELIEST[0], 0))
    return np.flatnonzero(np.array(finite)).tolist()


@pytest.mark.parametrize(
    ("top_p", "min_p", "top_k", "tokens"),
    [
        (None, None, None, [0, 1, 2, 3, 4]),
        (0.45, None, None, [0]),
        (0.75, None, None, [0, 2]),
        (0.85, None, None, [0, 2, 3]),
        (1.0, 0.0, 0, [0, 1, 2, 3, 4]),
        (None, 0.15, None, [0, 2, 3]),
        (None, 1.0, None, [0]),
        (None, None, 2, [0, 2]),
        (None, None, 5, [0, 1, 2, 3, 4]),
        (0.85, 0.15, 2, [0, 2]),
    ],
)
def test_filters_keep_the_likeliest_tokens(
    top_p: float | None, min_p: float | None, top_k: int | None, tokens: list[int]
) -> None:
    assert tokens_left(upstream.token_filters(top_p, min_p, top_k)) == tokens


def test_penalties_are_of_tokens_already_used() -> None:
    """Functions of (tokens so far, logits [1, vocabulary])."""
    module = "mlx_lm.sample_utils"
    parameters = inspect.signature(upstream.get(module, "make_logits_processors")).parameters
    assert {"repetition_penalty", "presence_penalty", "frequency_penalty"} <= set(parameters)
    history = mx.array([1, 1, 3])
    for penalties, expected in (
        ((2.0, None, None), [4.0, 1.0, -2.0, -4.0]),
        ((None, 0.5, None), [4.0, 1.5, -2.0, -2.5]),
        ((None, None, 0.5), [4.0, 1.0, -2.0, -2.5]),
    ):
        (penalize,) = upstream.penalties(*penalties)
        assert penalize(history, mx.array([[4.0, 2.0, -2.0, -2.0]])).tolist() == [expected]
    assert upstream.penalties(None, None, None) == []
    assert len(upstream.penalties(1.1, 0.5, 0.5)) == 3


# -- tool calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ((BUILT_IN[NAME] / "chat_template.jinja").read_text("utf-8"), "qwen3_coder"),
        ("{{ '<tool_call>\\n<function=' + call.name }}", "qwen3_coder"),
        ("<tool_call>\n{{ tool_call.name | tojson }}\n</tool_call>", "json_tools"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_parser_is_inferred_from_a_template(template: str | None, name: str | None) -> None:
    assert upstream.tool_parser_name(template, dict) == name


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_coder", "<function=add>\n<parameter=a>\n7\n</parameter>\n</function>"),
        ("json_tools", '{"name": "add", "arguments": {"a": 7}}'),
    ],
)
def test_parsers_read_a_call(name: str, text: str) -> None:
    parser = upstream.tool_parser(name)
    assert (parser.tool_call_start, parser.tool_call_end) == ("<tool_call>", "</tool_call>")
    assert parser.parse_tool_call(text, [TOOL]) == {"name": "add", "arguments": {"a": 7}}
