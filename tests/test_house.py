"""The house as it really is: which room imports which, read from the source. `pytest -s` draws it.

Floors go up; a room imports only from floors below its own. Running a model never needs what
prepares or judges one, and the plugin comes in by the door alone.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flash_moe

ROOT = Path(__file__).parents[1]
ENGINE, PLUGIN = ROOT / "backend" / "flash_moe", ROOT / "llm_flash_moe"

# Lowest first. A room is a package of the engine, or a module that stands alone.
FLOORS: list[set[str]] = [
    {"errors", "callbacks", "clock"},
    {"format"},
    {"options", "machine", "process", "mlx_library", "lean_import", "built_in"},
    {"arrays", "native", "thread", "upstream"},
    {"kernels"},
    {"checkpoint"},
    {"stream"},
    {"model"},
    {"chat", "decode"},
    {"grammar"},
    {"prefix"},
    {"engine", "inspection"},
    {"hold"},
    {"pack", "synth", "evaluation", "measure"},
    {"pull"},
    {"__init__"},
]
RUN = set().union(*FLOORS[:13])
PREPARE, JUDGE = {"pack", "synth", "pull"}, {"evaluation", "measure"}
# Formats and options are read by those who must start quickly, such as `llm --help`.
WITHOUT_MLX = (
    *("flash_moe", "flash_moe.options", "flash_moe.machine", "flash_moe.thread"),
    *("flash_moe.format.manifest", "flash_moe.format.sealed", "flash_moe.prefix.folder"),
    *("flash_moe.native.build", "flash_moe.mlx_library", "flash_moe.hold"),
    "llm_flash_moe",
)
MOST_LINES = 300


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(file: Path) -> str:
    return file.relative_to(ENGINE).parts[0].removesuffix(".py")


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every module of the engine that a file imports, wherever in it, for types included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("flash_moe"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flash_moe"):
            if node.module == "flash_moe":
                yield from (f"flash_moe.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def arrows() -> dict[str, set[str]]:
    """Room → the rooms that it imports from."""
    graph: dict[str, set[str]] = {}
    for file in sources(ENGINE):
        room = room_of(file)
        rooms = {module.split(".")[1] for module in imported(file) if "." in module}
        graph.setdefault(room, set()).update(rooms - {room})
    return graph


def test_every_room_has_a_floor() -> None:
    assert {room_of(file) for file in sources(ENGINE)} == set().union(*FLOORS)


def test_imports_go_down_only() -> None:
    graph = arrows()
    for number, rooms in enumerate(FLOORS):
        for room in sorted(rooms):
            print(f"{number:>2}  {room:<12} → {' '.join(sorted(graph[room])) or '-'}")
    up = [
        f"{room} → {other}"
        for room, others in graph.items()
        for other in others
        if floor_of(other) >= floor_of(room)
    ]
    assert not up, "imports that do not go down: " + ", ".join(sorted(up))


def test_running_needs_neither_preparing_nor_judging() -> None:
    graph = arrows()
    assert not [(room, graph[room] & (PREPARE | JUDGE)) for room in RUN if graph[room] & PREPARE]
    assert not [(room, graph[room] & JUDGE) for room in RUN if graph[room] & JUDGE]
    assert not [room for room in PREPARE if graph[room] & JUDGE]
    assert not [room for room in JUDGE if graph[room] & PREPARE]


def test_the_plugin_comes_in_by_the_door() -> None:
    names = set(flash_moe.__all__)
    for file in sources(PLUGIN):
        for module in imported(file):
            assert module.removeprefix("flash_moe.") in names, f"{file.name} imports {module}"


def test_the_door() -> None:
    """Every name is one that somebody outside needs, and each can be had."""
    assert sorted(flash_moe.__all__, key=str.lower) == [
        *("Benchmark", "BUILT_IN", "Checkpoint", "Diagnosis", "Engine", "errors", "Evaluation"),
        *("Event", "hold", "InferenceThread", "options", "PackJob", "PrefixSettings"),
        *("PromptFolder", "PullJob", "Reply", "Request", "Settings", "SynthJob", "write_json"),
    ]
    for name in flash_moe.__all__:
        assert getattr(flash_moe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        _ = flash_moe.Enigne


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_without_mlx(module: str) -> None:
    script = f"import {module}, sys; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"mlx", "mlx_lm", "transformers", "torch", "huggingface_hub", "tokenizers"}
    assert not heavy & set(done.stdout.split())


def test_the_engine_speaks_of_its_own_arguments() -> None:
    """Options of a command line, and llm's commands, are the plugin's words."""
    words = re.compile(r"llm (flash-moe|chat|install|keys)|`llm |(?<![\w-])-o [a-z]|\s--[a-z]")
    # Commands of other programs: compilers, pip, nvidia-smi.
    others = {"native/build.py", "measure/advice.py", "mlx_library.py", "machine.py"}
    for file in sources(ENGINE):
        if str(file.relative_to(ENGINE)) not in others:
            spoken = [line for line in file.read_text().splitlines() if words.search(line)]
            assert not spoken, f"{file.name}: {spoken}"


def test_rooms_are_small() -> None:
    long = {
        str(file.relative_to(ROOT)): count
        for folder in (ENGINE, PLUGIN)
        for file in sources(folder)
        if (count := len(file.read_text().splitlines())) > MOST_LINES
    }
    assert not long
