"""From Enter to the first word, with a process that holds the model and without, in turns.

    python backend/benchmarks/held_model.py NAME [--rounds 7] [--words 1]

Each round: `llm models`, which loads nothing; a prompt whose model is loaded by the command itself;
one that starts the process which holds it; and one that finds that process. Prompts differ, so that
none is continued from another; logs are off. Everything is in the page cache after the first round,
which is left out. Seconds from the start of the command to its first byte, what of that was the
prompt's, what was neither that nor `llm models`' own, and seconds to the end: medians.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

LLM = str(Path(sys.executable).with_name("llm"))
KEEP = ("-o", "keep_alive", "10m")
PROMPT = re.compile(r"first token after ([\d.]+) s")


class Seconds(NamedTuple):
    first: float
    prompt: float
    end: float


def measure(*arguments: str) -> Seconds:
    start = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen([LLM, *arguments], stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1), process.stderr.read().decode()
        first = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode()
    end = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(said)
    found = PROMPT.search(said)
    return Seconds(first, float(found[1]) if found else 0.0, end)


def stop() -> None:
    subprocess.run([LLM, "flash-moe", "stop"], stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--words", type=int, default=1)
    given = parser.parse_args()
    draw = random.Random(0)

    def prompt(*options: str) -> Seconds:
        text = " ".join(f"{draw.randrange(10**6)}" for _ in range(given.words))
        always = ("-n", "-o", "max_tokens", "1", "-o", "stats", "1")
        return measure("-m", given.name, *always, *options, text)

    rounds: list[dict[str, Seconds]] = []
    for _ in range(given.rounds + 1):
        stop()
        cases = {"llm models": measure("models"), "loaded here": prompt()}
        rounds.append(cases | {"starts it": prompt(*KEEP), "finds it": prompt()})
    stop()

    def middle(case: str, number: int) -> float:
        return statistics.median(one[case][number] for one in rounds[1:])

    own, here = middle("llm models", 0), middle("loaded here", 0)
    print(
        "| | first byte | of it the prompt | neither llm nor prompt | end | first byte ÷ loaded |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    for case in rounds[0]:
        first, asked, end = (middle(case, number) for number in range(3))
        rest = max(0.0, first - asked - own)
        figures = (first, asked, rest, end, first / here)
        print(f"| {case} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
