"""The registry against a dict, against damage, and against four processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from llm_flash_moe.errors import PluginError
from llm_flash_moe.registry import Entry, Registry
from tests.strategies import edited, json_values

NAMES = st.sampled_from(["a", "b", "qwen/397b", "Model-1.5_x", "0"])
BAD_NAMES = ["", "-a", ".a", "/a", "a b", "a\n", "../a", "a/../b", "é", "a" * 101, "a;b", "~"]
# Paths may hold any character, and bytes that are not UTF-8 come as lone surrogates.
PATHS = st.text(max_size=20) | st.just("/models/caf\udce9")
ENTRIES = st.builds(Entry, PATHS, st.none() | st.integers(1, 99), st.booleans())


class RegistryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.folder.name) / "deep" / "registry.json")
        self.model: dict[str, Entry] = {}

    @rule(name=NAMES, entry=ENTRIES)
    def add(self, name: str, entry: Entry) -> None:
        if name in self.model:
            with pytest.raises(PluginError, match="already"):
                self.registry.require_free(name)
            with pytest.raises(PluginError, match="already"):
                self.registry.add(name, entry)
        else:
            self.registry.require_free(name)
            self.registry.add(name, entry)
            self.model[name] = entry

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.model:
            assert self.registry.remove(name) == self.model.pop(name)
        else:
            with pytest.raises(PluginError, match="There is no model"):
                self.registry.remove(name)

    @rule(name=NAMES)
    def get(self, name: str) -> None:
        if name in self.model:
            assert self.registry.get(name) == self.model[name]
        else:
            with pytest.raises(PluginError, match="There is no model"):
                self.registry.get(name)

    @rule(name=st.sampled_from(BAD_NAMES), entry=ENTRIES)
    def add_badly(self, name: str, entry: Entry) -> None:
        with pytest.raises(PluginError, match="cannot be a model's name"):
            self.registry.add(name, entry)

    @invariant()
    def equal(self) -> None:
        assert Registry(self.registry.file).entries() == self.model

    def teardown(self) -> None:
        assert not list(self.registry.file.parent.glob(".*"))
        self.folder.cleanup()


def test_registry_against_a_dict() -> None:
    run_state_machine_as_test(
        RegistryMachine,
        settings=settings(max_examples=50, stateful_step_count=20, deadline=None),
    )


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "registry.json"


SOUND = {
    "version": 1,
    "models": {"a": {"path": "/a", "experts": None, "managed": False}, "b": {"path": "/b"}},
}


def damaged(file: Path, content: bytes) -> bool:
    """Whether the registry refuses a file; if it does, nothing may touch it."""
    file.write_bytes(content)
    registry = Registry(file)
    try:
        entries = registry.entries()
    except PluginError:
        for attempt in (
            lambda: registry.add("new", Entry("/new")),
            lambda: registry.remove("a"),
            lambda: registry.get("a"),
        ):
            with pytest.raises(PluginError):
                attempt()
        assert file.read_bytes() == content
        return True
    assert all(isinstance(entry.path, str) for entry in entries.values())
    assert all(entry.experts is None or type(entry.experts) is int for entry in entries.values())
    assert all(type(entry.managed) is bool for entry in entries.values())
    return False


@given(st.binary(max_size=50))
@settings(max_examples=100, deadline=None)
@example(b"")
@example(b"[" * 100_000)
@example(b'{"models": {"a": {"path": "/a", "experts": ' + b"9" * 5000 + b"}}}")
def test_random_bytes(scratch: Path, content: bytes) -> None:
    assert damaged(scratch, content)


@given(json_values)
@settings(max_examples=100, deadline=None)
def test_random_json(scratch: Path, value: object) -> None:
    assert damaged(scratch, json.dumps(value).encode())


@given(edited(SOUND))
@settings(max_examples=300, deadline=None)
def test_edited(scratch: Path, value: object) -> None:
    damaged(scratch, json.dumps(value).encode())


@pytest.mark.parametrize(
    "entry",
    [
        "/a",
        None,
        {},
        {"path": 1},
        {"path": "/a", "experts": True},
        {"path": "/a", "experts": "4"},
        {"path": "/a", "experts": 4.0},
    ],
    ids=range(7),
)
def test_damaged_entries(scratch: Path, entry: object) -> None:
    assert damaged(scratch, json.dumps({"models": {"b": {"path": "/b"}, "a": entry}}).encode())


def test_only_true_is_managed(scratch: Path) -> None:
    """Managed folders are deleted with their entry, so nothing else may count as true."""
    for value in (1, "true", "yes", [1]):
        scratch.write_text(json.dumps({"models": {"a": {"path": "/a", "managed": value}}}))
        assert Registry(scratch).get("a").managed is False


def test_four_processes_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from llm_flash_moe.registry import Entry, Registry\n"
        "registry = Registry(Path(sys.argv[1]))\n"
        "sys.stdin.readline()\n"
        "for n in range(25): registry.add(f'{sys.argv[2]}-{n}', Entry(f'/{n}', n + 1))\n"
        "registry.remove(f'{sys.argv[2]}-0')\n"
    )
    file = tmp_path / "registry.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, file, str(number)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
        )
        for number in range(4)
    ]
    for process in processes:  # all are told before any is waited for
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    for process in processes:
        process.wait(60)
    assert [process.returncode for process in processes] == [0] * 4
    assert Registry(file).entries() == {
        f"{number}-{n}": Entry(f"/{n}", n + 1) for number in range(4) for n in range(1, 25)
    }


@pytest.fixture
def read_only() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "registry.json").write_text(json.dumps(SOUND))
        path.chmod(0o555)
        yield path
        path.chmod(0o755)


def test_read_only_folder(read_only: Path, as_user: None) -> None:
    registry = Registry(read_only / "registry.json")
    assert registry.entries().keys() == {"a", "b"}
    for attempt in (lambda: registry.add("c", Entry("/c")), lambda: registry.remove("a")):
        with pytest.raises(PluginError, match="Cannot write"):
            attempt()
    with pytest.raises(PluginError, match="Cannot write"):
        Registry(read_only / "new" / "registry.json").add("c", Entry("/c"))
    assert json.loads(registry.file.read_bytes()) == SOUND


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError):
        Registry(tmp_path / "file" / "registry.json").add("a", Entry("/a"))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path / "registry.json")
    with pytest.raises(PluginError, match="cannot be a model's name"):
        registry.add(name, Entry("/a"))
    assert not registry.file.exists()
