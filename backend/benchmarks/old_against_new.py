"""Whether a change made anything slower: another checkout's environment against this one, in turn.

python backend/benchmarks/old_against_new.py OLD/.venv/bin/python [ROUNDS]

Seconds of processors and of the clock, the median of all rounds, and the ratio new ÷ old of each
round's pair. The machine's other work is in both.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DECODE = """
import llm
model = llm.get_model("flash-moe-tiny")
model.prompt("Hello").text()
response = model.prompt("How do I read a JSON file?", max_tokens=200)
text = response.text()
stats = response.json()
print(stats["tokens_per_second"], stats["seconds_to_first_token"])
"""
COMMANDS = {
    "llm --help": ["-m", "llm", "--help"],
    "a reply, whole process": ["-m", "llm", "-m", "flash-moe-tiny", "What is 4 + 3?"],
}


def run(python: str, arguments: list[str]) -> tuple[float, float, str]:
    """Processor seconds, seconds on the clock, and what was printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "LLM_USER_PATH": home}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [python, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=home,
        )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, seconds, done.stdout


def show(title: str, old: list[float], new: list[float]) -> None:
    ratios = sorted(b / a for a, b in zip(old, new, strict=True))
    print(
        f"{title:<34} old {statistics.median(old):8.3f}  new {statistics.median(new):8.3f}  "
        f"new/old {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def main() -> None:
    old = str(Path(sys.argv[1]).absolute())
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    for title, command in COMMANDS.items():
        pairs = [(run(old, command), run(sys.executable, command)) for _ in range(rounds)]
        show(f"{title}, processor s", [a[0] for a, _ in pairs], [b[0] for _, b in pairs])
        show(f"{title}, clock s", [a[1] for a, _ in pairs], [b[1] for _, b in pairs])
    texts = [
        [run(python, ["-c", DECODE])[2].split() for python in (old, sys.executable)]
        for _ in range(rounds)
    ]
    for place, title in enumerate(("decode, tokens/s", "time to first token, warm, s")):
        show(title, *([float(pair[side][place]) for pair in texts] for side in (0, 1)))


if __name__ == "__main__":
    main()
