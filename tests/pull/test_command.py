"""`llm flash-moe pull` and its neighbours, as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flash_moe.errors import CheckpointError, FetchFailed, FlashMoeError, UnsupportedModel
from flash_moe.format.atomic import locked_folder
from flash_moe.pull.job import PullJob
from flash_moe.pull.repository import find_repository
from tests.pack.packs import hashes, interrupt, pack
from tests.plugin.terminal import LLM, environment, fails, known, llm, works
from tests.pull.conftest import Serve
from tests.pull.hub import Hub, git_hash
from tests.pull.test_faults import FORMS, HURRIED, finely, one_after_the_other, pull


def models(home: Path) -> Path:
    return home / "llm-flash-moe" / "models"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_byte_once(source: Path, serve: Serve, tmp_path: Path, form: dict[str, int]) -> None:
    """What the plan says is what is sent: the repository, once, and nothing that is not needed."""
    hub = serve(source)
    job = PullJob.plan(hub.name, tmp_path / "pulled", experts=1, **form)
    planned, moved = job.fetch_bytes, job.moved_bytes
    assert planned + moved == job.repository.nbytes
    arrived: list[int] = []
    job.write(arrived.append)
    assert sum(arrived) == planned
    assert job.moved_bytes == hub.served == job.repository.nbytes
    assert hashes(tmp_path / "pulled") == hashes(pack(source, tmp_path / "p", experts=1, **form))
    size = sum(file.stat().st_size for file in (tmp_path / "pulled").iterdir())
    assert 0 <= size - job.form.pack_bytes < 60_000  # the manifest, headers, a new config
    assert hub.known
    assert not hub.leaked
    assert not [path for _, path in hub.requests if path.endswith((".md", ".py"))]


def test_pull_and_run(source: Path, serve: Serve, llm_home: Path) -> None:
    hub = serve(source)
    asked = llm("flash-moe", "pull", hub.name, "--bits", "2", stdin="n\n")
    assert "Pull it?" in asked.stdout
    assert asked.exit_code == 1
    assert not models(llm_home).exists()
    planned = works("flash-moe", "pull", hub.name, "--bits", "2", "--plan")
    assert "It can be kept as:" in planned.stdout
    assert "* --bits 2" in planned.stdout
    assert "less exact: experts requantized from 4-bit to 2-bit" in planned.stdout
    plan = json.loads(works("flash-moe", "pull", hub.name, "--bits", "2", "--json").stdout)
    assert [form["bits"] for form in plan["forms"]] == [None, None, 2]
    assert plan["commit"] == hub.main.commit
    assert not models(llm_home).exists()
    done = works("flash-moe", "pull", hub.name, "--bits", "2", "--yes", "--experts", "1")
    assert 'Ready: llm -m model-4bit-2bit "your prompt"' in done.stdout
    assert known()["model-4bit-2bit"]["experts"] == 1
    works("-m", "model-4bit-2bit", "Hello", "-o", "max_tokens", "2")
    assert "already a model" in fails("flash-moe", "pull", hub.name, "--bits", "2", "--yes")


def test_a_repository_that_lacks_weights(source: Path, serve: Serve, tmp_path: Path) -> None:
    copy = tmp_path / source.name
    shutil.copytree(source, copy)
    next(iter(sorted(copy.glob("model-*.safetensors")))).unlink()
    hub = serve(copy)
    assert f"{hub.name} lacks 1 of" in fails("flash-moe", "info", hub.name)


def test_options_that_do_not_go_together(source: Path, serve: Serve, llm_home: Path) -> None:
    hub = serve(source)
    for said, *arguments in (
        ("goes without --bits", str(source), "--verify", "--bits", "2"),
        ("this is on your disk", str(source), "--revision", "main"),
        ("for what is on your disk", hub.name, "--verify"),
    ):
        assert said in llm("flash-moe", "info", *arguments).stderr


def test_info_of_anything(source: Path, serve: Serve, llm_home: Path) -> None:
    hub = serve(source)
    remote = json.loads(works("flash-moe", "info", hub.name, "--bits", "2", "--json").stdout)
    local = json.loads(works("flash-moe", "info", source, "--bits", "2", "--json").stdout)
    assert remote["model"].items() <= local.items()
    assert "Get it with" in works("flash-moe", "info", hub.name, "--experts", "1").stdout
    here = works("flash-moe", "info", source).stdout
    assert f"Folder: {source}" in here
    works("flash-moe", "pull", hub.name, "--yes", "--name", "it")
    assert json.loads(works("flash-moe", "info", "it", "--json").stdout)["form"] == "pack"
    assert not list(models(llm_home).glob("*planned*"))


def test_names_before_there_are_weights(serve: Serve, source: Path) -> None:
    serve(source)
    for command in ("path", "doctor", "bench"):
        assert "llm flash-moe pull flash-moe-397b" in fails("flash-moe", command, "flash-moe-397b")
    assert "llm flash-moe pull flash-moe-397b" in llm("-m", "flash-moe-397b", "Hello").stderr
    message = fails("flash-moe", "pull", "flash-moe-397b", "--plan")
    assert "no repository mlx-community/Qwen3.5-397B-A17B-4bit" in message


def test_unfinished_ones_are_listed_and_removed(
    source: Path, serve: Serve, llm_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(source)
    monkeypatch.setattr("flash_moe.pull.job.Patience", lambda: HURRIED)
    with finely():
        hub.trouble = one_after_the_other([None] * 25 + ["500"] * 5000)
        message = llm("flash-moe", "pull", hub.name, "--yes", "--planes").stderr
    assert "Go on with the same command" in message.splitlines()[-1]
    listed = works("flash-moe", "models").stdout
    again = f"llm flash-moe pull {hub.name} --name model-4bit-planes --planes"
    assert "model-4bit-planes" in listed
    assert again in listed
    assert known()["model-4bit-planes"]["unfinished_bytes"] > 0
    assert again in fails("flash-moe", "info", "model-4bit-planes")
    assert "Known" not in fails("flash-moe", "path", "model-4bit-planes")
    (partial,) = models(llm_home).iterdir()
    with locked_folder(partial, "busy"):
        assert "is being written" in fails("flash-moe", "remove", "model-4bit-planes", "--yes")
    hub.trouble = lambda: None
    kept = llm("flash-moe", "pull", hub.name, "--bits", "2", "--name", "model-4bit-planes", "--yes")
    assert "was begun from another checkpoint, with other bits" in kept.stderr
    works("flash-moe", *again.split()[2:], "--yes")
    works("flash-moe", "remove", "model-4bit-planes", "--yes")
    hub.trouble = one_after_the_other([None] * 25 + ["500"] * 5000)
    with finely():
        assert llm("flash-moe", "pull", hub.name, "--yes").exit_code == 1
    assert "are free again" in works("flash-moe", "remove", "model-4bit", "--yes").stdout
    assert not list(models(llm_home).iterdir())
    assert not known()


def test_ctrl_c(source: Path, serve: Serve, llm_home: Path) -> None:
    """It says how to go on, and that goes on."""
    hub = serve(source)
    hub.rate = 400e3
    asked = [LLM, "flash-moe", "pull", hub.name, "--yes"]
    variables = {**environment(), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen(
        asked, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for _ in range(600):
            if hub.served > 300_000 or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert f"Go on with: llm flash-moe pull {hub.name} --name model-4bit" in errors
    hub.rate, before = None, hub.served
    works("flash-moe", "pull", hub.name, "--yes")
    assert 0 < hub.served - before < sum(f.stat().st_size for f in source.iterdir())
    reference = pack(source, llm_home / "reference")
    assert hashes(models(llm_home) / "model-4bit") == hashes(reference)


def test_a_revision_that_moves(source: Path, serve: Serve, tmp_path: Path) -> None:
    hub, target = serve(source), tmp_path / "pack"
    first = hub.main.commit
    hub.trouble = lambda: None
    job = PullJob.plan(hub.name, target, patience=HURRIED)
    with finely():
        hub.trouble = one_after_the_other([None] * 25 + ["500"] * 5000)
        with pytest.raises(FetchFailed):
            job.write()
    hub.trouble = lambda: None
    newer = tmp_path / "newer" / source.name
    shutil.copytree(source, newer)
    shard = sorted(newer.glob("model*"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    hub.push(newer)
    with pytest.raises(CheckpointError, match=f"begun from commit {first}"):
        PullJob.plan(hub.name, target, revision=hub.main.commit)
    said: list[str] = []
    PullJob.plan(hub.name, target, notice=said.append).write()
    assert f"has moved from {first[:10]} to {hub.main.commit[:10]}" in said[0]
    assert hashes(target) == hashes(pack(source, tmp_path / "packed"))
    # And one that is pulled anew is the new one.
    PullJob.plan(hub.name, tmp_path / "pack2").write()
    assert hashes(tmp_path / "pack2") == hashes(pack(newer, tmp_path / "packed2"))


def test_a_full_disk(
    source: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, target = serve(source), tmp_path / "pack"
    job = PullJob.plan(hub.name, target)
    real, left = os.pwrite, 60

    def full(fd: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    with finely(), monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(FlashMoeError, match="full"):
            job.write()
    assert not target.exists()
    PullJob.plan(hub.name, target).write()
    assert hashes(target) == hashes(pack(source, tmp_path / "packed"))


def test_one_pull_at_a_time(source: Path, serve: Serve, tmp_path: Path) -> None:
    hub, target = serve(source), tmp_path / "pack"
    jobs = [PullJob.plan(hub.name, target) for _ in range(2)]
    busy = pytest.raises(CheckpointError, match="Another pack is being written")
    with locked_folder(tmp_path / "pack.partial", "busy"), busy:
        jobs[0].write()
    jobs[1].write()
    with pytest.raises(CheckpointError, match="exists"):
        jobs[0].write()
    assert hashes(target) == hashes(pack(source, tmp_path / "packed"))


def test_files_that_are_gone(source: Path, serve: Serve, tmp_path: Path) -> None:
    """Records that the journal speaks of are missed, and not made anew of zeros."""
    hub, target = serve(source), tmp_path / "pack"
    job = PullJob.plan(hub.name, target, patience=HURRIED)
    with finely():
        interrupt(job.write, 10)
        parts = list((tmp_path / "pack.partial").glob("*.part"))
        assert parts
        for part in parts:
            part.unlink()
        with pytest.raises(CheckpointError, match="is gone"):
            pull(hub, target)
    assert not target.exists()


def test_strangers_repositories(source: Path, serve: Serve, tmp_path: Path) -> None:
    """Names that lead elsewhere, code, GGUF, sizes and hashes that are none."""
    hub = serve(source)
    listing = hub.main.siblings()

    def listed(*more: dict[str, object], only: bool = False) -> None:
        found = list(more) if only else [*listing, *more]
        hub.main.siblings = lambda: found  # type: ignore[method-assign, assignment]

    small = {"size": 3, "blobId": git_hash(b"abc")}
    listed(*({"rfilename": name, **small} for name in STRANGE))
    names = {file.name for file in find_repository(hub.name).files}
    assert names == {f["rfilename"] for f in listing} - {"README.md", "modeling_evil.py"}
    listed({"rfilename": "model.gguf", **small}, only=True)
    with pytest.raises(UnsupportedModel, match="GGUF"):
        find_repository(hub.name)
    listed({"rfilename": "flash-moe.json", **small})
    with pytest.raises(UnsupportedModel, match="a pack already"):
        find_repository(hub.name)
    for size, blob in ((-1, small["blobId"]), (1 << 60, small["blobId"]), (None, None), (3, "x")):
        listed({"rfilename": "extra.json", "size": size, "blobId": blob})
        with pytest.raises(FlashMoeError):
            find_repository(hub.name)
    for name in ("../x", "a/b/c", "org/..", "org/a\x1b[31m", "", "a" * 300):
        with pytest.raises(CheckpointError):
            find_repository(name)


def test_a_header_that_is_none(source: Path, serve: Serve, tmp_path: Path) -> None:
    """Its length is believed no further than the format's cap, and nothing is fetched for it."""
    folder = tmp_path / "Odd"
    shutil.copytree(source, folder)
    shard = sorted(folder.glob("model*"))[0]
    for start in (b"\xff" * 8, (200_000_000).to_bytes(8, "little"), (2).to_bytes(8, "little")):
        shard.write_bytes(start + shard.read_bytes()[8:])
        hub = serve(folder)
        with pytest.raises(CheckpointError, match="not a sound safetensors file"):
            PullJob.plan(hub.name, tmp_path / "pack")
        assert hub.served < 100_000


STRANGE = (
    *("../config.json", "/etc/passwd.json", "a/b.json", ".hidden.json", "x\x1b[31m.json"),
    *("model/../../model-1.safetensors", "setup.py", "sub/model-00001.safetensors", "a\nb.txt"),
)


def test_what_a_terminal_would_obey(serve: Serve, tmp_path: Path, source: Path) -> None:
    """Control characters of a config are shown as what they are."""
    folder = tmp_path / "Evil"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "x\x1b]0;owned\x07"
    (folder / "config.json").write_text(json.dumps(config))
    hub = serve(folder)
    said = fails("flash-moe", "pull", hub.name, "--plan")
    assert "\x1b" not in said
    assert "x\\x1b]0;owned\\x07" in said


def test_add_of_a_repository() -> None:
    message = fails("flash-moe", "add", "mlx-community/Qwen3-30B-A3B-4bit")
    assert "llm flash-moe pull mlx-community/Qwen3-30B-A3B-4bit" in message


def test_offline(monkeypatch: pytest.MonkeyPatch, serve: Serve, source: Path) -> None:
    hub = serve(source)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails("flash-moe", "pull", hub.name, "--plan")


def test_no_network(monkeypatch: pytest.MonkeyPatch, serve: Serve, source: Path) -> None:
    hub: Hub = serve(source)
    hub.close()
    assert "Is there a network?" in fails("flash-moe", "pull", hub.name, "--plan")
