"""Whether growing keeps the function of Hugging Face's model families: every family along every axis, in every room.

    python tools/check_families.py --write README.md

Every model is tiny and its own code. Each cell is the largest difference of the logits after twice the width, with
every unit copied, over the largest logit, all in fp32:

- module: a plain module, grown by itself, with parameters that all matter.
- engine: trained by ZeRO-3 on two ranks, under AutoEP where DeepSpeed has a preset for the family, grown in place.
- offline: the same engine's checkpoint, widened as files and loaded into a wide engine by plain DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from tqdm import tqdm

from ds_sparkling.benchmarks.common import free_port
from ds_sparkling.check.comparison import difference_after, first_runnable
from ds_sparkling.check.instance import Instance
from ds_sparkling.check.resolve import find_axes
from ds_sparkling.errors import ConfigError, PlanError
from ds_sparkling.factory import HuggingFaceFactory, import_transformers

#: The largest difference that counts as the same function.
KEPT = 1e-5
RANKS = 2

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
        preset: DeepSpeed's AutoEP preset for it, if there is one.
    """

    name: str
    config: Mapping[str, Any]
    preset: str | None = None


def _family(name: str, model_type: str, preset: str | None = None, **config: Any) -> Family:
    return Family(name, {"model_type": model_type, **_COMMON, **config}, preset)


FAMILIES = (
    _family("Qwen3-MoE", "qwen3_moe", "qwen3_moe", **_EXPERTS, num_experts=4, head_dim=8),
    _family("Qwen2-MoE", "qwen2_moe", "qwen3_moe", **_EXPERTS, num_experts=4, shared_expert_intermediate_size=40),
    _family("Mixtral", "mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    _family("DeepSeek-V2", "deepseek_v2", "deepseek_v2", **_DEEPSEEK, topk_method="greedy", n_group=1),
    _family("DeepSeek-V3", "deepseek_v3", "deepseek_v3", **_DEEPSEEK, n_group=2),
    _family("OLMoE", "olmoe", num_experts=4, num_experts_per_tok=2),
    _family("GPT-OSS", "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4),
    _family("GLM-4-MoE", "glm4_moe", **_EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
            head_dim=8, n_group=1, topk_group=1, use_qk_norm=True, attention_bias=True),
    _family("Llama", "llama"),
    _family("Qwen3", "qwen3", head_dim=8, tie_word_embeddings=True),
    _family("Gemma", "gemma", head_dim=8, tie_word_embeddings=True),
    _family("GPT-2", "gpt2", tie_word_embeddings=True),
)  # fmt: skip

#: Column -> sets of axes that may be it, the first that a family has; hidden widths that heads hang on come last.
AXES: Mapping[str, Sequence[tuple[str, ...]]] = {
    "hidden": (
        ("hidden_size",),
        ("hidden_size", "num_attention_heads"),
        ("hidden_size", "num_attention_heads", "num_key_value_heads"),
    ),
    "experts": (("moe_intermediate_size",),),
    "dense": (("intermediate_size",),),
    "shared": (("shared_expert_intermediate_size",),),
    "heads": (("num_attention_heads", "num_key_value_heads"), ("num_attention_heads",)),
    "vocabulary": (("vocab_size",),),
}


@dataclass(frozen=True)
class Cell:
    """What was found of a family and a column.

    Attributes:
        axes: that were grown.
        differences: of the logits, by room; empty if the growth is refused.
        refusal: why.
    """

    axes: tuple[str, ...]
    differences: Mapping[str, float]
    refusal: str = ""


def cells(family: Family, column: str) -> Cell | None:
    """Grow a family's plain module; None if it has no such width."""
    factory = HuggingFaceFactory(family.config)
    settings = import_transformers().AutoConfig.for_model(**family.config)
    refusal: tuple[tuple[str, ...], str] | None = None
    for axes in AXES[column]:
        known = {axis: getattr(settings, axis, None) for axis in axes}
        if not all(isinstance(width, int) for width in known.values()):
            continue
        widths: dict[str, int] = {axis: int(width) for axis, width in known.items() if width is not None}
        try:
            found = find_axes(factory, widths, [axes]).axes
        except PlanError as error:
            if "no parameter changes" not in str(error):
                refusal = refusal or (axes, str(error))
            continue
        instance = Instance(factory, widths, {axis: 2 * width for axis, width in widths.items()})
        runnable = first_runnable([instance], None, torch.float32, seed=0)
        return Cell(axes, {"module": difference_after(runnable, found)})
    return None if refusal is None else Cell(refusal[0], {}, refusal[1])
