"""What flash-moe-tiny is: Qwen3.5-MoE's architecture at a size that fits in a wheel.

Six layers, every fourth of full attention; 64 experts of 98,304 weights a layer, ten a token, so
that four are a real cut. All widths are multiples of 128: every kernel takes them, with groups of
64 and of 128. 37.7 of the 45 million weights are in routed experts.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 8192
ROW = 2048  # tokens a training row
LEARNED = 1 << 15  # this bit of a token in the data says that it is learned

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "full_attention_interval": 4,
    "num_experts": 64,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}

# config.json as the vendor nests it.
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe",
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "text_config": TEXT_CONFIG,
}
