"""Qwen3-MoE: a softmax router and nothing shared."""

from __future__ import annotations

from flash_moe.model.mixture import Mixture


class Qwen3MoeMixture(Mixture):
    block_type = ("mlx_lm.models.qwen3_moe", "Qwen3MoeSparseMoeBlock")
