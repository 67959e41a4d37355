"""Train flash-moe-tiny: python -m training.train --data DATA --out OUT [--steps N] [--stop-after N].

DATA is what corpus.py wrote. The learning rate is warmed up, kept, and brought to nothing over
the last part, so that a run that is stopped early has the same start as a whole one. OUT gets
loss.csv while it runs and at the end the weights (bfloat16, vendor's names) and usage.json, how
often each expert was chosen on held-out data.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from training.network import make_network, routers
from training.optimize import Optimizer
from training.shape import LEARNED, ROW

SEED = 20261121
WARM_UP = 200
DECAY_SHARE = 0.4
BALANCE = 0.01


class Rows:
    """Rows of tokens on the device: dialogues as packed, in an order drawn once; text anywhere."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.dialogues = _load(folder / "dialogues.bin", device).view(-1, ROW)
        self.text = _load(folder / "text.bin", device)
        random = torch.Generator().manual_seed(SEED)
        self.order = torch.randperm(len(self.dialogues), generator=random)

    def batch(self, step: int, size: int, text_share: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(SEED + step)
        texts = round(size * text_share)
        talks = size - texts
        # Disjoint from step to step while the share is the same: a walk through the order.
        at = (step * size + torch.arange(talks)) % len(self.order)
        starts = torch.randint(len(self.text) - ROW, (texts, 1), generator=random)
        where = (starts + torch.arange(ROW)).to(self.device)
        return torch.cat([self.dialogues[self.order[at].to(self.device)], self.text[where]])


def _load(file: Path, device: str) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(file, np.uint16).astype(np.int32)).to(device)


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    tokens = (rows & (LEARNED - 1)).long()
    labels = torch.where(rows >= LEARNED, tokens, -100).roll(-1, dims=1)
    labels[:, -1] = -100
    logits = model(input_ids=tokens).logits
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def rate_at(step: int, steps: int, peak: float) -> float:
    left = (steps - step) / (steps * DECAY_SHARE)
    return peak * min(1.0, (step + 1) / WARM_UP, left)


def text_share_at(step: int, steps: int) -> float:
    """Less text in the end: what is learned last is said best."""
    return 0.15 if step < steps * (1 - DECAY_SHARE) else 0.06


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    model.eval()
    losses = [loss_of(model, part).item() for part in rows.split(32)]
    model.train()
    return sum(losses) / len(losses)


def save(model: torch.nn.Module, out: Path) -> None:
    """As the vendor names them, so that mlx-lm reads it as it reads theirs."""
    weights = {
        name.replace("model.", "model.language_model.", 1): value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {ROW} tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_network(device)
    run = model if given.eager else torch.compile(model)
    rows = Rows(given.data, device)
    held = {
        kind: _load(given.data / f"held_out_{kind}.bin", device).view(-1, ROW)
        for kind in ("text", "dialogues")
    }
    optimizer = Optimizer(model)
    gates = routers(model)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"{weights / 1e6:.2f} M weights, {len(rows.dialogues) * ROW / 1e6:.1f} M tokens of "
        f"dialogues, {len(rows.text) / 1e6:.1f} M of text"
    )

    start = seen = time.perf_counter()
    with (given.out / "loss.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "tokens", "rate", "loss", "balance", "text", "dialogues"])
        for step in range(min(given.steps, given.stop_after or given.steps)):
            rate = rate_at(step, given.steps, given.rate)
            batch = rows.batch(step, given.rows, text_share_at(step, given.steps))
            loss = loss_of(run, batch)
            balance = sum(gate.balance for gate in gates) / len(gates)
            (loss + BALANCE * balance).backward()
            optimizer.step(rate)
            if step % 20 == 0 or step == given.steps - 1:
                line = [
                    step,
                    (step + 1) * given.rows * ROW,
                    f"{rate:.6f}",
                    f"{loss.item():.4f}",
                    f"{balance.item():.4f}",
                ]
                if step % 200 == 0 or step == given.steps - 1:
                    line += [f"{held_out_loss(run, held[kind]):.4f}" for kind in held]
                table.writerow(line)
                file.flush()
                now = time.perf_counter()
                speed = 20 * given.rows * ROW / (now - seen)
                print(*line, f"{speed / 1e3:.0f}k tokens/s", f"{now - start:.0f} s", flush=True)
                seen = now
    save(model, given.out)
    usage: dict[str, list[list[float]]] = {}
    with torch.no_grad():
        for kind, part in held.items():
            loss_of(model, part[:64])
            usage[kind] = [gate.used.tolist() for gate in gates]
    (given.out / "usage.json").write_text(json.dumps(usage))


if __name__ == "__main__":
    main()
