"""Tokens a second of the 397B at 2 bits, K=4, on machines: by arithmetic, with every input stated.

    python backend/benchmarks/projection.py

    a token = experts × ((1 - hits) / disk + hits / page cache + 1 / bus)
              + resident / memory + layers × own

`own` is what a layer takes when nothing is read: launches, the router's read-back, Python. The rows
of the H200 are there to see how far the arithmetic is off where everything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

EXPERTS, RESIDENT, LAYERS = 0.944, 5.5, 60  # GB a token, GB in memory


@dataclass(frozen=True, slots=True)
class Machine:
    """GB/s, and milliseconds a layer. `bus`: where experts must reach a GPU with its own memory."""

    name: str
    disk: float
    page_cache: float
    memory: float
    own: float
    hits: float
    bus: float | None = None
    measured: float | None = None  # milliseconds a token

    def milliseconds(self) -> float:
        reading = (1 - self.hits) / self.disk + self.hits / self.page_cache
        seconds = EXPERTS * (reading + (1 / self.bus if self.bus else 0)) + RESIDENT / self.memory
        return 1e3 * seconds + LAYERS * self.own


# H200: speed.md. own: 88 ms with nothing read, without 944 MB over the bus, a layer.
# M5 Pro: 17.3 GB/s cold, random reads of 2.76 MB, four or more at once; 235 GB/s of memory (others'
# measurements). M3 Max: 17.5 and 400 GB/s (others' figures). Page cache: 28 GB/s, the least that
# others saw. Hits: 30 % if experts were used evenly and 37 of 121 GB are cached; 71 % is what the
# original reports for 48 GB. own: 1.0 ms is the H200's, 0.3 is an assumption: nobody has measured
# ours on a Mac.
H200 = {"memory": 4_000, "own": 0.98, "bus": 32}
MACHINES = (
    Machine("H200, hot", 1.36, 19.3, hits=1, measured=150, **H200),
    Machine("H200, cold", 1.36, 19.3, hits=0, measured=829, **H200),
    *(
        Machine(f"{name}, {hits:.0%} cached, {own} ms a layer", disk, 28, memory, own, hits)
        for name, disk, memory in (("M3 Max 48 GB", 17.5, 400), ("M5 Pro 48 GB", 17.3, 235))
        for hits in (0.30, 0.71)
        for own in (1.0, 0.3)
    ),
)


def main() -> None:
    print("| machine | ms a token | tokens/s | measured, ms | projected ÷ measured |")
    print("|---|--:|--:|--:|--:|")
    for machine in MACHINES:
        ms, measured = machine.milliseconds(), machine.measured
        check = f"{measured:.0f} | {ms / measured:.2f}" if measured else "– | –"
        print(f"| {machine.name} | {ms:.0f} | {1e3 / ms:.1f} | {check} |")


if __name__ == "__main__":
    main()
