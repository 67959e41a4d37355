"""The READMEs are true: every command of the top one is run, what it prints is what is shown, and
what is generated is current. `cog -r llm_flash_moe/README.md` writes that anew."""

from __future__ import annotations

import re
import shlex
import shutil
from io import StringIO
from pathlib import Path

import pytest

from flash_moe import options
from tests.plugin.terminal import llm, works
from tests.pull.conftest import using
from tests.pull.hub import serving

ROOT = Path(__file__).parents[2]
README, PLUGIN = ROOT / "README.md", ROOT / "llm_flash_moe" / "README.md"
READMES = [README, PLUGIN, *ROOT.glob("backend/**/README.md"), ROOT / "shaders" / "README.md"]
MOST_LINES = 200
# A repository: the test puts a small model into one of this name, at a hub of its own.
DOWNLOAD = "Qwen3-30B-A3B-4bit"
# These change the machine or need a network. `make test` is how this runs, and CI runs the rest.
NOT_RUN = ("git clone ", "llm install ", "make ", "llm uninstall ")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)


def commands() -> list[tuple[str, str]]:
    """Of the top README: (command, the output that is shown)."""
    found = []
    for block in blocks(README, "sh"):
        found += [(line.split("  #")[0].strip(), "") for line in block.splitlines() if line]
    for block in blocks(README, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    text = re.sub(r"^```.*?^```$", "", README.read_text("utf-8"), flags=re.M | re.S)
    inline = re.findall(r"`(llm (?:(?:chat|-c|-m) |flash-moe (?:cache|path|info))[^`]*)`", text)
    return found + [(command.replace("NAME", DOWNLOAD.lower()), "") for command in inline]


def run(command: str, output: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "llm"
    if "flash-moe-397b" in arguments:
        assert "llm flash-moe pull flash-moe-397b" in llm(*arguments, "Hello").stderr
        return
    if arguments[0] in ("-m", "-c", "chat") and "flash-moe-tiny" not in arguments:
        arguments += ["-o", "max_tokens", "4"]  # random weights never stop by themselves
    typed = {"chat": "Hello\nquit\n", "flash-moe": "y\n"}
    result = works(*arguments, stdin=typed.get(arguments[0]))
    printed = re.sub(r"\s+", " ", result.output)
    for line in output.splitlines():
        assert re.sub(r"\s+", " ", line.strip()) in printed, f"{command} printed:\n{result.output}"


def test_the_top_readme_is_short() -> None:
    lines = len(README.read_text("utf-8").splitlines())
    print(f"README.md: {lines} lines")
    assert lines <= MOST_LINES


def test_every_command_of_the_top_readme_runs(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo_folder, tmp_path / DOWNLOAD)
    monkeypatch.chdir(tmp_path)
    done = []
    with serving(tmp_path / DOWNLOAD, organisation="mlx-community") as hub, using(hub):
        for command, output in commands():
            if not command.startswith(NOT_RUN):
                run(command, output)
                done.append(command)
    print("\n".join(done))
    assert len(done) >= 10
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command, _ in commands():
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in makefile


def test_the_python_of_the_plugins_readme_runs(
    llm_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One block after the other, as a reader would try them."""
    monkeypatch.setenv("HOME", str(llm_home))
    names: dict[str, object] = {}
    for block in blocks(PLUGIN, "python"):
        exec(compile(block, "README", "exec"), names)
    printed = capsys.readouterr().out
    assert "Recursively copy an entire directory tree" in printed
    assert "True" in printed.splitlines()[-1]


def test_every_option_and_command_is_in_the_plugins_readme() -> None:
    text = PLUGIN.read_text("utf-8")
    assert all(f"| `{name}` |" in text for name in options.OPTIONS)
    listed = re.findall(r"^  (\w+) {2,}", works("flash-moe", "--help").stdout, re.M)
    assert len(listed) >= 8
    assert all(f"llm flash-moe {name}" in text for name in listed)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    for link in links:
        if not link.startswith(("http", "#")):
            assert (path.parent / link.split("#")[0]).exists(), link


def test_what_is_generated_is_current(tmp_path: Path) -> None:
    cogapp = pytest.importorskip("cogapp")
    copy = tmp_path / "README.md"
    copy.write_text(PLUGIN.read_text("utf-8"), "utf-8")
    cog = cogapp.Cog()
    cog.set_output(StringIO(), StringIO())
    assert cog.main(["cog", "-r", str(copy)]) == 0
    assert copy.read_text("utf-8") == PLUGIN.read_text("utf-8")
