"""Tiny configs of Hugging Face model families, each with all that its family has: shared experts, ties, biases ..."""

from __future__ import annotations

from typing import Any

from benchmarks import family_list

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gemma3_text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "phi": {
        "hidden_size": 32,
        "intermediate_size": 48,
    },
    "phi3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    },
    "olmo2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    },
    "granite": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.2,
    },
    "cohere": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
    },
    "stablelm": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    },
    "starcoder2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    },
    "minimax_m2": {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granitemoe": {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "ernie4_5_moe": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 2,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
    },
    "llama4_text": {
        "hidden_size": 32,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    },
    "nemotron": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "bloom": {
        "hidden_size": 32,
    },
    "falcon": {
        "hidden_size": 32,
        "multi_query": False,
    },
    "qwen3_next": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}

#: model_type -> config: the families of the docs' table, and others.
FAMILIES: dict[str, dict[str, Any]] = {
    **{family.config["model_type"]: dict(family.config) for family in family_list.FAMILIES},
    **{family: {"model_type": family, **_SIZES, **own} for family, own in _OWN.items()},
}
