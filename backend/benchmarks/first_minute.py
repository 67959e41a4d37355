"""The picture in the README: what `llm` really prints for some prompts of the built-in model.

python backend/benchmarks/first_minute.py .github/first-minute.svg
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

LLM = Path(sys.executable).with_name("llm")
COMMANDS = (
    ("-m", "flash-moe-tiny", "What does os.path.join do?"),
    ("-m", "flash-moe-tiny", "What is 468 + 357?", "-o", "thinking", "1"),
    ("-m", "flash-moe-tiny", "What version of llm is this?", "-T", "llm_version", "--td"),
    ("-m", "flash-moe-tiny", "--schema", "name, age int", "Ada Lovelace is 36."),
    ("-m", "flash-moe-tiny", "My name is Ada."),
    ("-c", "What is my name?"),
)


def main() -> None:
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    with tempfile.TemporaryDirectory() as home:
        for arguments in COMMANDS:
            shown = " ".join(f'"{a}"' if " " in a else a for a in arguments)
            console.print(Text(f"$ llm {shown}", style="bold"))
            done = subprocess.run(
                [LLM, *arguments],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "LLM_USER_PATH": home},
            )
            for text, style in ((done.stderr, "dim"), (done.stdout, "")):
                if text.strip():
                    console.print(Text(text.strip(), style=style))
            console.print()
    Path(sys.argv[1]).parent.mkdir(exist_ok=True)
    console.save_svg(sys.argv[1], title="llm -m flash-moe-tiny")


if __name__ == "__main__":
    main()
