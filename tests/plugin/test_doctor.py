"""`llm flash-moe doctor` and `-o runtime`: what computes the experts, and what is said about it.

On machines as they are: without a compiler, with a cache that cannot be used, with the wrong
library of MLX or none. Only NVIDIA's own tools and what they print are stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_moe.inspection import Checkpoint
from flash_moe.kernels.runtime import choose_runtime
from flash_moe.machine import Nvidia, parse_driver, parse_smi, parse_vm_stat
from flash_moe.measure.advice import cuda_advice, mend_import
from flash_moe.mlx_library import Backends, find_backends
from flash_moe.model.load import Settings, load
from flash_moe.native.build import find_compiler
from llm_flash_moe.commands.doctor import READERS
from tests.architectures import random_model, write_checkpoint
from tests.plugin.terminal import LLM, environment, fails, llm, logged, works

SHORT = ("-o", "max_tokens", 12)
ON_CPU = mx.default_device() == mx.cpu
on_cpu = pytest.mark.skipif(not ON_CPU, reason="MLX uses a GPU here")
on_native = pytest.mark.skipif(choose_runtime().name != "native", reason="no native kernels here")
on_linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or find_backends().installed != ("mlx-cpu",),
    reason="elsewhere MLX has another library",
)


@pytest.fixture(autouse=True)
def demo(demo_folder: Path, llm_home: Path) -> None:
    register(llm_home, demo=demo_folder)


def register(llm_home: Path, **folders: Path) -> None:
    """As `llm flash-moe add` does it, without its second of work."""
    registry = llm_home / "llm-flash-moe" / "models.json"
    registry.parent.mkdir(parents=True, exist_ok=True)
    models = {name: {"path": str(folder)} for name, folder in folders.items()}
    registry.write_text(json.dumps({"models": models}))


def run(*arguments: object, **variables: str | Path | None) -> subprocess.CompletedProcess[str]:
    """The installed command with other environment variables; None removes one."""
    given = {**environment(), **{name: str(value) for name, value in variables.items() if value}}
    env = {name: text for name, text in given.items() if variables.get(name, "") is not None}
    return subprocess.run(
        [str(LLM), *map(str, arguments)], capture_output=True, text=True, timeout=600, env=env
    )


def diagnosed(**variables: str | Path | None) -> tuple[str, dict[str, Any]]:
    """What doctor prints where nothing is broken, as text and as JSON."""
    text = run("flash-moe", "doctor", **variables)
    facts = run("flash-moe", "doctor", "--json", **variables)
    for done in (text, facts):
        assert (done.returncode, done.stderr) == (0, "")
    return text.stdout, json.loads(facts.stdout)


# This machine ---------------------------------------------------------------------------------


def test_doctor_tells_what_a_reply_will_use() -> None:
    text, facts = diagnosed()
    runtime = choose_runtime()
    assert (facts["runtime"], facts["why"]) == (runtime.name, runtime.why)
    assert text.startswith(f"Experts  {runtime.name}: ")
    works("-m", "demo", *SHORT, "Hello")
    assert logged()[-1]["response_json"]["runtime"] == facts["runtime"]
    assert facts["reader"] == ("native" if find_compiler() else "Python")
    assert f"\nReading  {READERS[facts['reader']]}\n" in text
    assert facts["mlx"] == mx.__version__
    assert facts["device"] == ("CPU" if ON_CPU else "GPU")
    machine = facts["machine"]
    assert 1 <= machine["cores"] <= (os.cpu_count() or 1)
    assert 0 < machine["page_cache_bytes"] <= machine["memory_bytes"]
    assert f"CPU      {machine['cpu']}, {machine['cores']} cores\n" in text


@on_native
def test_the_kernels_are_kept_for_the_next_start_and_made_again_if_damaged(tmp_path: Path) -> None:
    for harm in (False, True):
        if harm:
            (cached,) = tmp_path.rglob("native-*.so")
            os.truncate(cached, 10_000)
        text, facts = diagnosed(XDG_CACHE_HOME=tmp_path)
        (cached,) = tmp_path.rglob("native-*.so")
        native = facts["native"]
        assert (native["file"], native["kept"], facts["faster"]) == (str(cached), True, [])
        assert native["threads"] >= 1
        assert f"compiled once, cached in {cached}\n" in text


# Machines that lack something -----------------------------------------------------------------


@on_cpu
def test_without_a_compiler_mlx_computes_in_float32_and_the_command_is_named(
    tmp_path: Path,
) -> None:
    bare: dict[str, Path | None] = {"PATH": tmp_path, "XDG_CACHE_HOME": tmp_path, "CC": None}
    text, facts = diagnosed(**bare)
    assert (facts["runtime"], facts["widen"], facts["native"]) == ("mlx", True, None)
    assert facts["reader"] == "Python"
    (faster,) = facts["faster"]
    assert "No C compiler was found. On Debian: apt install gcc" in faster
    assert f"Faster   {faster}\n" in text
    assert "\n16 bits  " in text
    reply = run("-m", "demo", *SHORT, "-o", "stats", 1, "Hello", **bare)
    assert (reply.returncode, bool(reply.stdout.strip())) == (0, True)
    assert "mlx runtime" in reply.stderr
    wish = run("-m", "demo", *SHORT, "-o", "runtime", "native", "Hello", **bare)
    assert (wish.returncode, wish.stdout) == (1, "")
    (line,) = wish.stderr.splitlines()
    assert line.startswith("Error: runtime=native is not available here: choose auto or mlx. No C")


@on_native
def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    text, facts = diagnosed(CC=shutil.which("false"), XDG_CACHE_HOME=tmp_path)
    assert facts["runtime"] == "mlx"
    assert "could not compile the native kernels. Set CC to another compiler" in text


@on_native
def test_a_cache_that_is_no_folder_costs_time_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text, facts = diagnosed(XDG_CACHE_HOME=tmp_path / "file")
    assert (facts["runtime"], facts["native"]["kept"]) == ("native", False)
    assert "compiled anew at every start. Set XDG_CACHE_HOME to a folder" in text


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """MLX as it is installed here, in a folder of its own, to be harmed."""
    folder = tmp_path / "site"
    for name in ("mlx", "mlx-cpu"):
        for file in distribution(name).files or ():
            if "include" not in file.parts and (source := Path(str(file.locate()))).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / file)
    return folder


def broken(site: Path) -> tuple[str, dict[str, Any], str]:
    """What doctor prints, its facts, and its error, of which there must be one."""
    path = os.pathsep.join([str(site), *sys.path])
    text = run("flash-moe", "doctor", "demo", PYTHONPATH=path)
    facts = run("flash-moe", "doctor", "demo", "--json", PYTHONPATH=path)
    assert (text.returncode, facts.returncode) == (1, 1)
    assert text.stderr == facts.stderr
    (line,) = text.stderr.splitlines()
    assert line.startswith("Error: ")
    found = json.loads(facts.stdout)
    assert line == f"Error: {found['broken'][0]}"
    return text.stdout, found, line


@on_linux_cpu
def test_the_wrong_library_of_mlx_is_an_error_with_its_mend(site: Path) -> None:
    """pip brought the CPU's back over CUDA's; all still runs, on the CPU."""
    info = site / f"mlx_cuda_13-{mx.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: {mx.__version__}\n"
    )
    (info / "RECORD").write_text("mlx/lib/libmlx.so,sha256=x,146000000\n")
    text, facts, error = broken(site)
    assert facts["runtime"] in ("native", "mlx")
    assert facts["faster"] == list(filter(None, [choose_runtime().faster]))
    assert (facts["backends"]["active"], facts["backends"]["wanted"]) == ("mlx-cpu", "mlx-cuda-13")
    assert error.endswith(f"--force-reinstall --no-deps mlx-cuda-13=={mx.__version__}")
    assert "on the CPU (mlx-cpu)" in text
    assert "Faster   no" not in text


@on_linux_cpu
@pytest.mark.parametrize("uninstalled", [False, True])
def test_an_mlx_that_cannot_be_loaded_is_told_with_its_mend(site: Path, uninstalled: bool) -> None:
    """Also as `pip install mlx` leaves it, without any back end."""
    (site / "mlx/lib/libmlx.so").unlink()
    if uninstalled:
        shutil.rmtree(next(site.glob("mlx_cpu*.dist-info")))
    text, facts, error = broken(site)
    assert (facts["runtime"], facts["device"]) == (None, None)
    assert "MLX cannot be loaded: libmlx.so: cannot open shared object" in facts["why"]
    assert text.startswith("Experts  nothing can: models do not run\nWhy      MLX cannot be loaded")
    assert f"pip install --force-reinstall {'mlx' if uninstalled else '--no-deps mlx-cpu'}" in error
    assert error.endswith(f"mlx-cpu=={mx.__version__}")


def test_the_cuda_wheel_without_a_driver_can_go_back_to_the_cpu() -> None:
    cuda = Backends(("mlx-cpu", "mlx-cuda-13"), "mlx-cuda-13", "mlx-cuda-13", None)
    text = mend_import("libcuda.so.1: cannot open shared object file", "0.32.4", cuda)
    assert "no NVIDIA driver" in text
    assert "pip uninstall -y mlx-cuda-13 && " in text
    assert text.endswith("--force-reinstall --no-deps mlx-cpu==0.32.4")


# NVIDIA ---------------------------------------------------------------------------------------


@on_linux_cpu
@pytest.mark.parametrize(
    ("printed", "advice"),
    [
        ("580.65.06, 9.0", "llm install 'llm-flash-moe[cuda13]'"),
        ("570.86.15, 8.9\n570.86.15, 8.9", "llm install 'llm-flash-moe[cuda12]'"),
        ("535.183.01, 8.0", "Update it to 580 or newer"),
        ("550.90.07, 7.0", "too old for MLX, which needs"),
        ("No devices were found", None),
    ],
)
def test_a_gpu_that_mlx_could_use(tmp_path: Path, printed: str, advice: str | None) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}\\n'\n")
    tool.chmod(0o755)
    text, facts = diagnosed(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = [line for line in facts["faster"] if "NVIDIA" in line]
    assert len(found) == (advice is not None)
    assert advice is None or (advice in found[0] and f"Faster   {found[0]}\n" in text)


@pytest.mark.parametrize(
    ("driver", "installed", "advice"),
    [
        ((580,), ("mlx-cpu",), "[cuda13]"),
        ((579, 99), ("mlx-cpu",), "[cuda12]"),
        ((550, 54, 14), ("mlx-cpu",), "[cuda12]"),
        ((550, 54), ("mlx-cpu",), "too old"),
        # A wheel that wants a newer driver than there is; and one that should run.
        ((550, 54, 14), ("mlx-cpu", "mlx-cuda-13"), "[cuda12]"),
        ((590, 1), ("mlx-cpu", "mlx-cuda-12"), "mlx-cuda-12 is installed, but MLX does not see"),
        (None, ("mlx-cpu", "mlx-cuda-12"), "no NVIDIA GPU is found"),
        (None, ("mlx-cpu",), None),
    ],
)
def test_advice_by_driver_and_wheels(
    driver: tuple[int, ...] | None, installed: tuple[str, ...], advice: str | None
) -> None:
    text = cuda_advice(Nvidia(driver, None) if driver else None, installed)
    assert (text is None) == (advice is None)
    assert (advice or "") in (text or "")


def test_what_tools_and_kernels_print() -> None:
    assert parse_smi("570.86.15, 9.0\n570.86.15, 9.0\n") == Nvidia((570, 86, 15), (9, 0))
    assert parse_smi("470.1, [N/A]\n") == Nvidia((470, 1), None)
    assert parse_smi("NVIDIA-SMI has failed because it couldn't communicate\n") is None
    closed = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024"
    )
    opened = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build  "
        "(dvs-builder@U22)  Sat May 24 07:22:43 UTC 2025"
    )
    gcc = "\nGCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
    assert parse_driver(closed + gcc) == (550, 54, 15)
    assert parse_driver(opened + gcc) == (575, 57, 8)
    assert parse_driver(gcc) is None
    mac = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                                4.\n"
        "Pages active:                            100.\n"
        "Pages inactive:                            2.\n"
        "Pages speculative:                         1.\n"
    )
    assert (parse_vm_stat(mac), parse_vm_stat("")) == (7 * 16384, None)


# Layers of a model ----------------------------------------------------------------------------


def test_a_model_of_ours_is_covered_and_no_weight_is_looked_at(
    demo_folder: Path, tmp_path: Path
) -> None:
    """Headers are enough: the weights of this copy are a hole in the file."""
    hollow = tmp_path / "hollow"
    shutil.copytree(demo_folder, hollow)
    for file in hollow.glob("*.safetensors"):
        size, head = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
        os.truncate(file, head)
        os.truncate(file, size)
    register(tmp_path / "llm-home", hollow=hollow)
    would = " would be" if choose_runtime().name == "mlx" else ""
    text = works("flash-moe", "doctor", "hollow").stdout
    assert f"\nLayers   4 of 4{would} computed by our kernels\nDisk " in text
    facts = json.loads(works("flash-moe", "doctor", "hollow", "--json").stdout)
    assert (facts["model"], list(facts["layers"].values())) == ("hollow", [None] * 4)


@pytest.mark.parametrize(
    ("name", "quantized", "reason"),
    [
        ("qwen3_moe", {"bits": 3}, None),
        ("qwen3_moe", {"bits": 5}, "gate_proj has 5 bits, not 2, 3, 4, 8"),
        ("qwen3_moe", {"bits": 4, "mode": "mxfp4"}, "gate_proj is quantized as mxfp4, not affine"),
        ("qwen3_moe", {}, "gate_proj is not quantized"),
        ("gpt_oss", {"bits": 4}, "its activation is SwigluOAI, not SwiGLU"),
        ("gemma4_text", {"bits": 4}, "its activation is GeGLU, not SwiGLU"),
        ("nemotron_h", {"bits": 4}, "it is a SwitchMLP, not a SwitchGLU"),
        ("ernie4_5_moe+bias", {"bits": 4}, "its projections have a bias"),
    ],
)
def test_layers_that_are_left_to_mlx(
    name: str, quantized: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    model, config = random_model(name, **quantized)
    write_checkpoint(model, config, tmp_path / "model")
    register(tmp_path / "llm-home", model=tmp_path / "model")
    facts = json.loads(works("flash-moe", "doctor", "model", "--json").stdout)
    layers, disk = facts["layers"], facts["disk"]
    assert set(layers.values()) == {reason}
    text = works("flash-moe", "doctor", "model").stdout
    assert disk["token_bytes"] == Checkpoint(tmp_path / "model").plan().token_bytes
    limit = r"\d+\.\d\d GB/s for experts of this model: \d+\.\d tokens/s at most"
    assert re.search(rf"^Disk +{limit if disk['rate'] else 'not measured'}", text, re.MULTILINE)
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    assert reason is None or f"left to MLX: {next(iter(layers))}{more}: {reason}\n" in text
    # And so it is when the model is loaded.
    loaded = load(tmp_path / "model", Settings())
    streamed = dict(loaded.model.named_modules())
    covered = {path: streamed[path].layer.spec is not None for path in layers}
    loaded.close()
    assert set(covered.values()) == {reason is None and choose_runtime().name != "mlx"}


def test_names_that_are_unknown_and_folders_that_are_gone(tmp_path: Path) -> None:
    assert "There is no model 'nope'" in fails("flash-moe", "doctor", "nope")
    register(tmp_path / "llm-home", gone=tmp_path / "gone")
    assert "is gone" in fails("flash-moe", "doctor", "gone")


# -o runtime -----------------------------------------------------------------------------------


def test_the_runtime_that_was_asked_for_computes_and_is_logged() -> None:
    """Also in one process, where the model of another runtime is loaded already."""
    best = choose_runtime().name
    for wish, name in ((None, best), ("mlx", "mlx"), (best, best), ("auto", best)):
        works("-m", "demo", *SHORT, *(("-o", "runtime", wish) if wish else ()), "Hello")
        turn = logged()[-1]
        assert turn["response_json"]["runtime"] == name
        assert turn["options_json"].get("runtime") == wish


def test_runtimes_that_are_not_there() -> None:
    wish = "metal" if sys.platform != "darwin" else "cuda"
    message = fails("-m", "demo", *SHORT, "-o", "runtime", wish, "Hello")
    assert message.startswith(f"runtime={wish} is not available here: choose auto or ")
    assert message.endswith("GPU that MLX can use.")
    assert fails("chat", "-m", "demo", "-o", "runtime", wish, stdin="Hello\nquit\n") == message


@pytest.mark.parametrize("wish", ["gpu", "", "Metal"])
def test_runtimes_that_nobody_knows(wish: str) -> None:
    result = llm("-m", "demo", *SHORT, "-o", "runtime", wish, "Hello")
    assert result.exit_code == 1
    assert "runtime" in result.stderr
    assert "choose auto, metal, cuda, native, mlx" in result.stderr
    assert len(result.stderr.splitlines()) <= 2
