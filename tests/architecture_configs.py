"""A tiny config for every mlx-lm model file that builds a SwitchGLU or a SwitchMLP.

Each is the shared base with the changes that its file needs; mlx-lm picks the fields that it
knows. Three layers where one kind is enough, more where kinds alternate. The part of a
name after "+" says how its config differs from the plain one.

A checkpoint in mlx-lm's own form goes through `sanitize` once more when it is loaded, and that is
not harmless everywhere. Exceptions are noted beside the entry; for all others it was tried that
`sanitize` of sanitized weights changes nothing.
"""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    # Latent attention.
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 16,
    "rope_scaling": None,
}

# Changes after which no matrix has fewer than 128 columns: MLX 0.32.4 on CUDA computes narrower
# ones wrongly when they are quantized. Four of eight experts, so that there are some to leave out.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}

EXPERTS, PER_TOKEN = 8, 2
# The names of the number of experts and of K, where they are not "num_experts" and
# "num_experts_per_tok". No config has another's key, so that code which looks for one must know
# them all.
COUNT_KEYS = {
    **dict.fromkeys(
        (
            *("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41", "dots1"),
            *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash", "kimi_k2", "kimi_k25"),
            *("longcat_flash", "longcat_flash_ngram", "mimo_v2_flash", "mistral3", "mistral4"),
            *("nemotron_h", "solar_open"),
        ),
        "n_routed_experts",
    ),
    **dict.fromkeys(
        (
            *("gpt_oss", "granitemoe", "granitemoehybrid", "llama4", "minimax", "minimax_m2"),
            *("minimax_m3_vl", "mixtral", "muse_spark", "phimoe", "phixtral"),
        ),
        "num_local_experts",
    ),
    "ernie4_5_moe": "moe_num_experts",
    "step3p5": "moe_num_experts",
}
PER_TOKEN_KEYS = {
    "ernie4_5_moe": "moe_k",
    "gemma4": "top_k_experts",
    "hunyuan": "moe_topk",  # an int, or a list with one for every layer
    "kimi_k3": "num_experts_per_token",
    "kimi_linear": "num_experts_per_token",
    "longcat_flash": "moe_topk",  # of routed and zero experts together
    "longcat_flash_ngram": "moe_topk",
    "step3p5": "moe_top_k",
}


def _config(name: str, **changes: Any) -> dict[str, Any]:
    routing = {
        COUNT_KEYS.get(name, "num_experts"): EXPERTS,
        PER_TOKEN_KEYS.get(name, "num_experts_per_tok"): PER_TOKEN,
    }
    return {**BASE, **routing, "model_type": name, **changes}


def _nested(name: str, text_type: str | None = None, **changes: Any) -> dict[str, Any]:
    text = {**_config(name, **changes), "model_type": text_type or f"{name}_text"}
    return {"model_type": name, "vocab_size": text["vocab_size"], "text_config": text}


def _table(*configs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {config["model_type"]: config for config in configs}


YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MULTIPLIERS = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 0.5,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_proj_bias": False,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 2,
}
KDA = {
    "linear_attn_config": {
        "kda_layers": [1, 2],
        "full_attn_layers": [3],
        "num_heads": 2,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
        "gate_lower_bound": -5.0,
    },
    "hidden_act": "situ",
    "model_max_length": 512,
}
# Half of the experts, in the best groups alone, are there to choose from.
GROUPS = {"n_group": 4, "topk_group": 2}
BAILING = {"layer_group_size": 2, "group_norm_size": 2}
GLM = {"use_qk_norm": True, "partial_rotary_factor": 0.5}
INDEXED = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 8}
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    # They do nothing: mlx-lm sends their tokens to expert 0 and gives that a weight of zero.
    "zero_expert_num": 2,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MINIMAX = {"shared_intermediate_size": 32, "rotary_dim": 8}
NEMOTRON = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "hybrid_override_pattern": ["M", "E", "*", "E", "-"],
    "layers_block_type": None,
}

CONFIGS = _table(
    _config("Klear", mlp_only_layers=[0]),
    _config("afmoe", layer_types=[SLIDING, FULL, SLIDING], num_dense_layers=1),
    _config("bailing_hybrid", **BAILING, **GROUPS, head_dim=32, num_key_value_heads=4),
    # No `norm_head`: sanitize would divide lm_head by its norms at every load.
    _config("bailing_moe", use_qk_norm=True, moe_router_enable_expert_bias=True),
    _config("bailing_moe_linear", **BAILING),
    _config("deepseek"),
    _config("deepseek_v2", **GROUPS, rope_scaling=YARN, topk_method="group_limited_greedy"),
    # Sanitize drops layer 61 whatever the number of layers, here and in all that build on it.
    _config("deepseek_v3", **GROUPS, topk_method="noaux_tc"),
    _config("deepseek_v32", **INDEXED, **GROUPS),
    # Its attention has a SwitchLinear (o_a_proj) that is no expert's.
    # Sanitize returns early if any name starts with "model.", which vendors' never do.
    _config(
        "deepseek_v41",
        **INDEXED,
        num_hidden_layers=5,
        head_dim=32,
        o_groups=2,
        o_lora_rank=32,
        hc_mult=2,
        # Layer by layer: no compression; an index alone; by two: one makes, one selects, one reads.
        compress_ratios=[0, 1, 2, 2, 2],
        kv_source_layer_ids=[1, 2],
        index_source_layer_ids=[1, 2, 3],
        candidate_source_layer_id=2,
        candidate_topk_blocks=2,
        candidate_block_size=2,
    ),
    _config("dots1"),
    # Sanitize drops `e_score_correction_bias`, which its model does not have.
    _config("ernie4_5_moe", use_bias=False, moe_num_shared_experts=1, moe_layer_start_index=1),
    _config("exaone_moe", layer_types=[SLIDING, FULL, SLIDING], is_moe_layer=[False, True, True]),
    # Sanitize drops k_proj, v_proj and k_norm of the layers that share another's keys.
    _nested(
        "gemma4",
        num_hidden_layers=4,
        enable_moe_block=True,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=2,
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        tie_word_embeddings=True,
        use_double_wide_mlp=True,
    ),
    # Sanitize drops what starts with "model.layers.{num_hidden_layers}", so 3 and 30 alike.
    _config("glm4_moe", **GLM),
    _config("glm4_moe_lite"),
    _config("gpt_oss", layer_types=[SLIDING, FULL, SLIDING]),
    _config("granitemoe", **MULTIPLIERS),
    _config(
        "granitemoehybrid",
        **MULTIPLIERS,
        **MAMBA,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=32,
    ),
    # Lists as in the published configs, and keys and values that the next layer uses too.
    _config(
        "hunyuan",
        moe_topk=[PER_TOKEN] * 3,
        moe_intermediate_size=[32] * 3,
        num_shared_expert=[1] * 3,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling={"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    ),
    _config(
        "jamba",
        num_hidden_layers=4,
        # Mamba, Mamba with experts, Mamba, attention with experts.
        attn_layer_offset=3,
        attn_layer_period=4,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=16,
        mamba_expand=2,
    ),
    # Its experts are narrower than the model.
    _nested(
        "kimi_k3",
        **KDA,
        attn_res_block_size=2,
        num_key_value_heads=4,
        routed_expert_hidden_size=32,
        latent_moe_use_norm=True,
        mla_use_output_gate=True,
    ),
    _config("kimi_linear", **KDA),
    _config(
        "laguna",
        layer_types=[FULL, SLIDING, FULL],
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_attention_heads_per_layer=[4, 8, 4],
        moe_router_logit_softcapping=5.0,
    ),
    # Sanitize turns a conv.weight whose last axis is longer than its second, [64, 1, 3], as
    # vendors have it; renames every w1, w2 and w3.
    _config(
        "lfm2_moe",
        use_expert_bias=True,
        num_dense_layers=1,
        conv_bias=False,
        conv_L_cache=3,
        layer_types=["conv", FULL, "conv"],
    ),
    # It multiplies the inputs, not the outputs, by the scores, and asserts K = 1.
    _nested(
        "llama4",
        attention_chunk_size=8,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_experts_per_tok=1,
        use_qk_norm=True,
    ),
    _config("longcat_flash", **LONGCAT),
    _config(
        "mellum",
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={SLIDING: DEFAULT_ROPE, FULL: DEFAULT_ROPE},
    ),
    _config(
        "mimo_v2_flash",
        hybrid_layer_pattern=[0, 1, 1],
        moe_layer_freq=[0, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=16,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        layernorm_epsilon=1e-5,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        swa_v_head_dim=16,
        partial_rotary_factor=0.5,
    ),
    # This one, mixtral, phimoe, olmoe, qwen2_moe, hunyuan and mellum look at layer 0 to learn
    # whether experts are stacked; a first layer without experts would leave the others as they are.
    _config("minimax", **MINIMAX),
    # Sanitize takes a stack of one expert more than the config says apart, as the shared expert.
    _nested(
        "minimax_m3_vl",
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=[FULL, "sparse", FULL],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    _config("mistral4", rope_parameters=YARN),
    _config("mixtral"),
    _nested(
        "muse_spark",
        post_norm_eps=1e-5,
        rope_parameters=DEFAULT_ROPE,
        layer_rope_theta=[10000.0, 0, 10000.0],
        layer_types=[SLIDING, FULL, SLIDING],
        final_logit_softcapping=20.0,
        output_multiplier=1.0,
        moe_hidden_size=32,
        num_shared_experts=0,
    ),
    _config("nemotron_h", **NEMOTRON),
    _config("olmoe"),
    _config("phimoe"),
    # Its experts are four times as wide as the model.
    _config("phixtral", num_vocab=128, model_dim=32, num_heads=4, num_layers=3, rotary_dim=8),
    _config("qwen2_moe"),
    _config("qwen3_moe", mlp_only_layers=[1]),
    # Sanitize adds one to the norms if experts are not stacked yet...
    _config("qwen3_next", **LINEAR),
    # ...if names are as vendors have them...
    _config(
        "step3p5",
        num_attention_groups=2,
        share_expert_dim=32,
        moe_layers_enum="1,2",
        layer_types=[FULL, SLIDING, FULL],
        # The second layer with experts has another activation than the first.
        swiglu_limits=[0, 0, 0.5],
        swiglu_limits_shared=[0, 0, 0.5],
    ),
    # Files of their own that build on those above, and other names for them.
    # ...and if any conv1d is as vendors have it, so never sanitize a part of the weights.
    _nested("qwen3_5_moe", **LINEAR),
    _nested("qwen3_5", **LINEAR),
    _nested("qwen3_vl_moe"),
    _config(
        "glm_moe_dsa",
        **INDEXED,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        rope_parameters=DEFAULT_ROPE,
    ),
    _config("joyai_llm_flash", topk_method="noaux_tc"),
    _config("kimi_k2", topk_method="noaux_tc"),
    _nested("kimi_k25", "kimi_k2", topk_method="noaux_tc"),
    _config(
        "longcat_flash_ngram",
        **LONGCAT,
        ngram_vocab_size_ratio=2,
        emb_neighbor_num=2,
        emb_split_num=2,
    ),
    _config("minimax_m2", **MINIMAX),
    _nested("mistral3", "mistral4", rope_parameters=YARN),
    _config("solar_open", **GLM),
)
# Reached as vendors name them: through gemma4, and as another bailing_hybrid.
CONFIGS["gemma4_text"] = CONFIGS.pop("gemma4")
CONFIGS["bailing_moe_v3"] = {
    **_config("bailing_hybrid", **GROUPS, layer_group_size=2, head_dim=32),
    "architectures": ["BailingMoeV3ForCausalLM"],
}
CONFIGS |= {
    # Sanitize stacks no biases: these exist in mlx-lm's form only.
    "bailing_moe+bias": _config("bailing_moe", use_bias=True, use_qkv_bias=True),
    "ernie4_5_moe+bias": _config("ernie4_5_moe", use_bias=True),
    "nemotron_h+latent": _config("nemotron_h", **NEMOTRON, moe_latent_size=32),
}

# Limits of K: llama4 takes 1 alone; with groups, more than n_routed_experts / n_group * topk_group
# would choose masked experts; MLX crashes on bailing_moe with 1.

# Model file → why it is not tested.
UNCOVERED: dict[str, str] = {}
