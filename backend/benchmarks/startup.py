"""What the plugin costs every `llm` command: `llm --help` with it and without, in turns.

    python backend/benchmarks/startup.py [--pairs 20]

Of each the least time, on the clock and of the processor: what else the machine does only adds.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

LLM = Path(sys.executable).with_name("llm")


def measure(plugins: bool) -> tuple[float, float]:
    # llm loads none of those that are installed if it is given an empty list.
    environment = os.environ if plugins else {**os.environ, "LLM_LOAD_PLUGINS": ""}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([LLM, "--help"], env=environment, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=20)
    pairs = [(measure(True), measure(False)) for _ in range(parser.parse_args().pairs)]
    for name, which in (("clock", 0), ("processor", 1)):
        ours, plain = (min(pair[side][which] for pair in pairs) for side in (0, 1))
        print(f"{name}: {ours:.3f} s with the plugin, {plain:.3f} s without: {ours / plain:.3f}")


if __name__ == "__main__":
    main()
