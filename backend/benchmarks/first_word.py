"""A one-token reply of the built-in model against `llm models`, in turns, for any number of
environments: old and new code in one run.

    python backend/benchmarks/first_word.py [--rounds 16] [--model flash-moe-tiny] VENV…

Medians on the clock, and the ratio of the two; with a command's output, its first and last byte are
timed, too: what comes after the last is the end of the process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path
from statistics import median


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte, and to the end."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("environments", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--model", default="flash-moe-tiny")
    given = parser.parse_args()
    commands = {"models": ["models"], "reply": ["-m", given.model, "hi", "-o", "max_tokens", "1"]}
    results: dict[tuple[Path, str], list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        for venv in given.environments:
            for name, arguments in commands.items():
                command = [str(venv / "bin" / "llm"), *arguments]
                results.setdefault((venv, name), []).append(timed(command))
    for venv in given.environments:
        plain, reply = results[venv, "models"], results[venv, "reply"]
        ratio = median(b[1] / a[1] for a, b in zip(plain, reply, strict=True))
        first, end = (median(times) for times in zip(*reply, strict=True))
        print(
            f"{venv}: llm models {median(a[1] for a in plain):.3f} s; first word {first:.3f} s, "
            f"end {end:.3f} s; ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
