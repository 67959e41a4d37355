"""Muon for matrices, Adam for the rest, float32 masters of bfloat16 weights.

Muon (Jordan and others, 2024) makes every update of a matrix orthogonal; the 0.2 √width of
Moonlight (2025) gives it the size of Adam's, so that both share a learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ADAM_ALWAYS = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "conv1d")


@dataclass(slots=True)
class _Slot:
    weight: torch.nn.Parameter
    master: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor | None  # Adam's
    decays: bool


class Optimizer:
    def __init__(self, model: torch.nn.Module, *, decay: float = 0.1, clip: float = 1.0) -> None:
        self.decay, self.clip, self.step_number = decay, clip, 0
        self.slots = [_slot(name, p) for name, p in model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def step(self, rate: float) -> torch.Tensor:
        """One update with the gradients that lie there; gives their norm before it was clipped."""
        self.step_number += 1
        grads = [slot.weight.grad.float() for slot in self.slots]  # type: ignore[union-attr]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        for slot, grad in zip(self.slots, grads, strict=True):
            update = self._adam(slot, grad) if slot.second is not None else _muon(slot, grad)
            if slot.decays:
                slot.master.mul_(1 - rate * self.decay)
            slot.master.add_(update, alpha=-rate)
        torch._foreach_copy_([s.weight for s in self.slots], [s.master for s in self.slots])
        for slot in self.slots:
            slot.weight.grad = None
        return norm

    def _adam(self, slot: _Slot, grad: torch.Tensor) -> torch.Tensor:
        assert slot.second is not None
        slot.first.lerp_(grad, 0.1)
        slot.second.lerp_(grad * grad, 0.05)
        mean = slot.first / (1 - 0.9**self.step_number)
        return mean / ((slot.second / (1 - 0.95**self.step_number)).sqrt() + 1e-10)


def _slot(name: str, weight: torch.nn.Parameter) -> _Slot:
    master = weight.detach().float().clone()
    adam = weight.ndim < 2 or any(part in name for part in ADAM_ALWAYS)
    second = torch.zeros_like(master) if adam else None
    decays = weight.ndim >= 2 and "conv1d" not in name
    return _Slot(weight, master, torch.zeros_like(master), second, decays)


def _muon(slot: _Slot, grad: torch.Tensor) -> torch.Tensor:
    slot.first.lerp_(grad, 0.05)
    ahead = torch.lerp(grad, slot.first, 0.95)
    return orthogonal(ahead).float() * (0.2 * max(ahead.shape[-2:]) ** 0.5)


@torch.compile(dynamic=False)
def orthogonal(grad: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with equal singular values, roughly: five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
