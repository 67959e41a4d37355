"""`llm flash-moe …`: what each command does, and what it says when it cannot."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from llm.cli import cli

from flash_moe import PackJob
from llm_flash_moe.paths import new_folder
from tests.plugin.terminal import LLM, environment, fails, installed_llm, known, llm, works

SMALL = ("--layers", 4, "--experts", 4)


@pytest.fixture(scope="module")
def packed_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "packed"
    PackJob.plan(demo_folder, target).write()
    return target


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A model that mlx-lm builds and that has no experts."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 64,
    }
    folder = tmp_path / "dense"
    folder.mkdir()
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_synth_makes_a_model_that_replies(llm_home: Path) -> None:
    made = works("flash-moe", "synth", *SMALL)
    assert made.stdout == (
        "Made flash-moe-demo, a model of random weights: its replies are noise.\n"
    )
    assert list(known()) == ["flash-moe-demo"]
    assert works("-m", "flash-moe-demo", "-o", "max_tokens", 4, "Hello").stdout.strip()
    # Nothing is kept anywhere else, nor left over.
    folder = llm_home / "llm-flash-moe" / "models"
    assert [path.name for path in folder.iterdir()] == ["flash-moe-demo"]


def test_synth_with_fewer_experts_than_a_token_wants() -> None:
    works("flash-moe", "synth", "--layers", 4, "--experts", 2)
    assert (
        json.loads(works("flash-moe", "info", "flash-moe-demo", "--json").stdout)[
            "experts_per_token"
        ]
        == 2
    )
    assert works("-m", "flash-moe-demo", "-o", "max_tokens", 4, "Hello").stdout.strip()


def test_synth_refuses_shapes_that_could_not_run() -> None:
    result = llm("flash-moe", "synth", "--layers", 3)
    assert result.exit_code == 2
    assert "x>=4" in result.stderr
    assert known() == {}


def test_add_uses_a_folder_where_it_is(demo_folder: Path) -> None:
    added = works("flash-moe", "add", demo_folder, "--name", "mine", "--experts", 2)
    assert "2 a token (the model's own number is 4: faster, less exact)" in added.stdout
    assert added.stdout.endswith('Ready: llm -m mine "your prompt"\n')
    assert known() == {"mine": {"path": str(demo_folder), "experts": 2}}
    listed = works("flash-moe", "models").stdout.splitlines()
    assert listed[1:] == [f"mine  {demo_folder}  (2 experts a token)"]


def test_add_names_a_model_after_its_folder(demo_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "My-Model")
    works("flash-moe", "add", f"{tmp_path}/other/../My-Model/")
    assert list(known()) == ["my-model"]


def test_pack_makes_a_copy_that_stands_alone(demo_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo_folder, source)
    packed = works("flash-moe", "pack", source, "--name", "packed")
    assert "qwen3_5_moe, 4-bit, pack" in packed.stdout
    works("flash-moe", "add", source, "--name", "plain")
    ask = ("-o", "max_tokens", 12, "Hello")
    reply = works("-m", "plain", *ask).stdout
    shutil.rmtree(source)
    assert works("-m", "packed", *ask).stdout == reply


def test_pack_to_another_place(demo_folder: Path, tmp_path: Path) -> None:
    works("flash-moe", "pack", demo_folder, "--name", "p", "--to", tmp_path / "disk")
    assert known()["p"]["path"] == str(tmp_path / "disk" / "p")
    assert "its files stay in" in works("flash-moe", "remove", "p").stdout
    assert (tmp_path / "disk" / "p" / "config.json").exists()


def test_models_when_there_are_none_and_when_one_is_gone(tmp_path: Path) -> None:
    assert "llm flash-moe add PATH" in works("flash-moe", "models").stdout
    assert known() == {}
    works("flash-moe", "synth", *SMALL, "--name", "x", "--to", tmp_path)
    shutil.rmtree(tmp_path / "x")
    listed = works("flash-moe", "models").stdout.splitlines()
    assert listed[1:] == [f"x  {tmp_path / 'x'}  (the folder is gone)"]


def test_info_says_what_is_needed(demo_folder: Path, packed_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "plain")
    works("flash-moe", "add", packed_folder, "--name", "packed")
    text = works("flash-moe", "info", "plain").stdout
    assert "experts   8 in each of 4 layers, 4 a token\n" in text
    assert text.endswith(f"Folder: {demo_folder}\n")
    found = {
        name: json.loads(works("flash-moe", "info", name, "--json").stdout)
        for name in ("plain", "packed")
    }
    assert (found["plain"]["form"], found["packed"]["form"]) == ("in place", "pack")
    for name, plan in found.items():
        assert plan["name"] == name
        assert plan["token_bytes"] == 4 * 4 * plan["record_bytes"]
        # 256 × 128 weights in each of three projections; 4 bits, and 8 bytes for a group of 64.
        assert plan["record_bytes"] == 3 * 256 * 128 * (4 + 1) // 8


def test_verify_finds_one_changed_byte(packed_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(packed_folder, folder)
    works("flash-moe", "add", folder)
    assert "as it was written" in works("flash-moe", "info", "packed", "--verify").stdout
    sound = works("flash-moe", "info", "packed", "--verify", "--json").stdout
    assert json.loads(sound)["faults"] == []
    with (folder / "layer_001.experts").open("r+b") as file:
        file.seek(5 * (folder / "layer_001.experts").stat().st_size // 8 + 100)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    result = llm("flash-moe", "info", "packed", "--verify")
    assert result.exit_code == 1
    assert "layer_001.experts: expert 5 of " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: The pack is damaged.")
    broken = llm("flash-moe", "info", "packed", "--verify", "--json")
    assert broken.exit_code == 1
    assert len(json.loads(broken.stdout)["faults"]) == 2


def test_verify_needs_a_pack(demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder)
    assert "only packs carry checksums" in fails("flash-moe", "info", "demo", "--verify")


@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("n\n", False), ("", False)])
def test_remove_asks_before_it_deletes(llm_home: Path, answer: str, goes: bool) -> None:
    works("flash-moe", "synth", *SMALL)
    folder = llm_home / "llm-flash-moe" / "models" / "flash-moe-demo"
    result = llm("flash-moe", "remove", "flash-moe-demo", stdin=answer)
    assert result.exit_code == (0 if goes else 1)
    assert f"Delete {folder} as well?" in result.output
    assert folder.exists() != goes
    assert bool(known()) != goes


def test_remove_with_yes_asks_nothing(llm_home: Path) -> None:
    works("flash-moe", "synth", *SMALL, "--name", "a/b")
    removed = works("flash-moe", "remove", "a/b", "--yes")
    assert removed.output == "Removed a/b.\n"
    assert list((llm_home / "llm-flash-moe" / "models").iterdir()) == []
    assert known() == {}


def test_remove_keeps_what_is_elsewhere(demo_folder: Path, tmp_path: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "mine")
    assert works("flash-moe", "remove", "mine", "--yes").stdout == (
        f"Removed mine; its files stay in {demo_folder}.\n"
    )
    assert (demo_folder / "config.json").exists()
    works("flash-moe", "synth", *SMALL, "--name", "x", "--to", tmp_path)
    assert "its files stay" in works("flash-moe", "remove", "x", "--yes").stdout
    assert (tmp_path / "x" / "config.json").exists()


def test_remove_forgets_a_model_whose_folder_is_gone(tmp_path: Path) -> None:
    works("flash-moe", "synth", *SMALL, "--name", "x", "--to", tmp_path)
    shutil.rmtree(tmp_path / "x")
    assert works("flash-moe", "remove", "x").output == "Removed x.\n"
    assert known() == {}


def test_no_model_lies_inside_another() -> None:
    """Else removing `a` would delete `a/b`."""
    names = ["a", "a/b", "a/b/c"]
    folders = [new_folder(name, None) for name in names]
    assert not any(one in other.parents for one in folders for other in folders)
    for name in names:
        works("flash-moe", "synth", *SMALL, "--name", name)
    works("flash-moe", "remove", "a", "--yes")
    assert works("-m", "a/b", "-o", "max_tokens", 2, "Hello").stdout.strip()


def test_path_prints_folders(llm_home: Path, demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "mine")
    assert works("flash-moe", "path").stdout == f"{llm_home / 'llm-flash-moe'}\n"
    assert works("flash-moe", "path", "mine").stdout == f"{demo_folder}\n"


def test_looking_creates_nothing(llm_home: Path) -> None:
    works("flash-moe", "models")
    works("flash-moe", "path")
    works("models")
    assert not (llm_home / "llm-flash-moe").exists()


# What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["info", "remove", "path"])
def test_unknown_names(command: str, demo_folder: Path) -> None:
    assert fails("flash-moe", command, "nope") == "There is no model 'nope'. Known: flash-moe-tiny."
    works("flash-moe", "add", demo_folder, "--name", "mine")
    refusal = "There is no model 'nope'. Known: flash-moe-tiny, mine."
    assert fails("flash-moe", command, "nope") == refusal


def bringing_in(folder: Path) -> list[tuple[Any, ...]]:
    """The commands that register a model."""
    return [("add", folder), ("pack", folder), ("synth", *SMALL)]


def test_names_that_are_taken(demo_folder: Path, llm_home: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "mine")
    before = known()
    for command in bringing_in(demo_folder):
        message = fails("flash-moe", *command, "--name", "mine")
        assert "There is already a model 'mine'." in message
        assert "llm flash-moe remove mine" in message
    assert known() == before
    assert not (llm_home / "llm-flash-moe" / "models").exists()


@pytest.mark.parametrize("name", ["../up", "a b", "", "-x", "/abs", "a" * 101, "é"])
def test_names_that_cannot_be(name: str, demo_folder: Path, llm_home: Path) -> None:
    for command in bringing_in(demo_folder):
        if name or command[0] == "synth":
            message = fails("flash-moe", *command, f"--name={name}")
            assert message.startswith(f"{name!r} cannot be a model's name")
    assert not llm_home.exists() or not list(llm_home.rglob("*.safetensors"))


@pytest.mark.parametrize("command", ["add", "pack"])
def test_folders_that_are_no_checkpoints(command: str, tmp_path: Path, demo_folder: Path) -> None:
    assert "is not a folder" in fails("flash-moe", command, tmp_path / "nowhere", "--name", "x")
    (tmp_path / "empty").mkdir()
    assert "Cannot read" in fails("flash-moe", command, tmp_path / "empty", "--name", "x")
    shutil.copytree(demo_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("model*"))
    message = fails("flash-moe", command, tmp_path / "bare", "--name", "x")
    assert "holds no model*.safetensors" in message
    assert known() == {}


@pytest.mark.parametrize("command", ["add", "pack"])
def test_dense_models_are_refused(command: str, dense_folder: Path) -> None:
    message = fails("flash-moe", command, dense_folder)
    assert "llama" in message
    assert known() == {}


@pytest.mark.parametrize("experts", [9, 100])
def test_more_experts_than_there_are(demo_folder: Path, experts: int) -> None:
    for command in bringing_in(demo_folder)[:2]:
        message = fails("flash-moe", *command, "--name", "x", "--experts", experts)
        assert "choose 1 to 8" in message
    assert known() == {}


def test_a_model_without_a_tokenizer_is_not_added(demo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    done = installed_llm("flash-moe", "add", folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {folder} has no tokenizer.json")
    assert "Traceback" not in done.stderr
    assert known() == {}


@pytest.mark.parametrize("command", ["info", "add"])
def test_folders_that_went_away(command: str, tmp_path: Path) -> None:
    works("flash-moe", "synth", *SMALL, "--name", "x", "--to", tmp_path)
    shutil.rmtree(tmp_path / "x")
    if command == "info":
        message = fails("flash-moe", "info", "x")
        assert "is gone" in message
        assert message.endswith("remove the model from the list: llm flash-moe remove x")
    else:
        assert "There is already a model 'x'" in fails("flash-moe", "add", tmp_path / "x")


def test_targets_that_cannot_be_written(demo_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for command in (("synth", *SMALL), ("pack", demo_folder)):
        message = fails("flash-moe", *command, "--name", "x", "--to", file)
        assert message in (f"{file}/x.partial: Not a directory.", f"{file}: File exists.")
    assert known() == {}


def test_a_full_disk_leaves_nothing_registered(llm_home: Path) -> None:
    """A limit on the size of files stands in for it: the write fails in the same place."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [str(LLM), "flash-moe", "synth", *map(str, SMALL)],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=limited,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: File too large.\n"
    assert known() == {}
    assert works("flash-moe", "synth", *SMALL)
    assert works("-m", "flash-moe-demo", "-o", "max_tokens", 2, "Hello").stdout.strip()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_synth_interrupted_leaves_nothing_registered(llm_home: Path, how: signal.Signals) -> None:
    folder = llm_home / "llm-flash-moe" / "models"
    # 0.9 GB if it were left alone; more, if it was over before the signal came.
    for experts in (2048, 4096, 8192):
        running = subprocess.Popen(
            [str(LLM), "flash-moe", "synth", "--experts", str(experts)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        while running.poll() is None and not list(folder.glob("*.partial/*.safetensors")):
            time.sleep(0.005)
        running.send_signal(how)
        _, error = running.communicate(timeout=600)
        if running.returncode:
            break
        works("flash-moe", "remove", "--yes", "flash-moe-demo")
    assert running.returncode == (1 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in error
    assert known() == {}
    assert not (folder / "flash-moe-demo").exists()
    works("flash-moe", "synth", *SMALL)
    assert [path.name for path in folder.iterdir()] == ["flash-moe-demo"]


def test_every_command_has_help() -> None:
    group = cli.commands["flash-moe"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        text = CliRunner().invoke(cli, ["flash-moe", name, "--help"]).stdout
        assert (command.help or "").splitlines()[0] in text
