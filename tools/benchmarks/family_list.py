"""The model families of the transformers library that are grown, each as a tiny config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {key: value for key, value in _COMMON.items() if key not in ("intermediate_size", "num_key_value_heads")}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Family:
    """One architecture of the transformers library.

    Attributes:
        name: as people call it.
        config: a tiny model of it.
        experts: its axis of the experts' inner width; None for a dense model.
        preset: DeepSpeed's AutoEP preset for it, if there is one.
    """

    name: str
    config: Mapping[str, Any]
    experts: str | None = None
    preset: str | None = None


_INNER, DENSE = "moe_intermediate_size", "intermediate_size"

FAMILIES = (
    Family("Qwen3-MoE", {"model_type": "qwen3_moe", **_COMMON, **_EXPERTS, "num_experts": 4, "head_dim": 8,
           "mlp_only_layers": [0]}, _INNER, "qwen3_moe"),
    Family("Qwen2-MoE", {"model_type": "qwen2_moe", **_COMMON, **_EXPERTS, "num_experts": 4,
           "shared_expert_intermediate_size": 40}, _INNER, "qwen3_moe"),
    Family("Mixtral", {"model_type": "mixtral", **_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
           DENSE, "mixtral"),
    Family("DeepSeek-V2", {"model_type": "deepseek_v2", **_COMMON, **_DEEPSEEK, "topk_method": "greedy",
           "n_group": 1}, _INNER, "deepseek_v2"),
    Family("DeepSeek-V3", {"model_type": "deepseek_v3", **_COMMON, **_DEEPSEEK, "n_group": 2}, _INNER, "deepseek_v3"),
    Family("OLMoE", {"model_type": "olmoe", **_COMMON, "num_experts": 4, "num_experts_per_tok": 2}, DENSE),
    Family("GPT-OSS", {"model_type": "gpt_oss", **_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2,
           "head_dim": 8, "sliding_window": 4}, DENSE),
    Family("GLM-4-MoE", {"model_type": "glm4_moe", **_COMMON, **_EXPERTS, "n_routed_experts": 4,
           "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1,
           "use_qk_norm": True, "attention_bias": True}, _INNER),
    Family("Llama", {"model_type": "llama", **_COMMON}),
    Family("Qwen3", {"model_type": "qwen3", **_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    Family("Gemma", {"model_type": "gemma", **_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    Family("GPT-2", {"model_type": "gpt2", **_GPT2, "tie_word_embeddings": True}),
)  # fmt: skip
