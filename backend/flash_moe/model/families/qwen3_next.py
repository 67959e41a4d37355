"""Qwen3-Next and Qwen3.5: a softmax router, and a shared expert behind a gate of its own."""

from __future__ import annotations

from flash_moe.model.mixture import Mixture


class Qwen3NextMixture(Mixture):
    block_type = ("mlx_lm.models.qwen3_next", "Qwen3NextSparseMoeBlock")
    shared_names = ("shared_expert", "shared_expert_gate")
