"""Make the config of a Hugging Face model smaller, whichever architecture it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from ds_sparkling.discovery.factory import import_transformers, own_name

#: The size of the vocabulary, and how many token ids a small one has.
VOCABULARY, TOKENS = "vocab_size", 128
#: What a config calls the number of experts, and how many of them a token is sent to.
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_top_k")
#: Widths, axes or not, that are divided like the axes: names, and ends of names.
_WIDTHS = ("n_embd", "n_inner", "d_model", "d_ff", "ffn_dim", "hidden_size", "intermediate_size", "lora_rank")
#: What heads and key/value heads are called.
_HEADS = ("num_attention_heads", "num_key_value_heads")
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its architecture filled in, under the architecture's own names."""
    return {**import_transformers().AutoConfig.for_model(**config).to_dict(), "model_type": config["model_type"]}


def following(config: Mapping[str, Any], widths: Mapping[str, int]) -> set[str]:
    """Settings that a config leaves to its architecture, and that follow the ``widths`` there.

    Llama has as many key/value heads as heads if its config doesn't say otherwise. The size of heads isn't among them:
    :class:`~ds_sparkling.discovery.factory.HuggingFaceFactory` holds it.
    """
    now = resolved({**config, **widths})
    found: set[str] = set()
    for axis, width in widths.items():
        moved = resolved({**config, **widths, axis: 2 * width})
        found |= {key for key, value in moved.items() if value != now.get(key)} - {own_name(config, axis)}
    return found - config.keys() - {"head_dim"}


def fewer_layers(config: Mapping[str, Any], total: int, kept: int) -> dict[str, Any] | None:
    """A resolved config cut to its first ``kept`` of ``total`` layers, lists of one entry per layer included.

    None if it doesn't say how many layers there are. A config may count them under another name than the library's:
    LongCat has two blocks of attention, and so two of the library's layers, in each of its own.
    """
    counts = [key for key in (own_name(config, "num_hidden_layers"), "num_layers") if config.get(key) == total]
    if not counts:
        return None
    cut = {
        key: value[:kept] if isinstance(value, list) and len(value) == total else value for key, value in config.items()
    }
    followers = {key for key in (own_name(config, "num_hidden_layers"),) if key not in counts}
    return {key: value for key, value in cut.items() if key not in followers} | {counts[0]: kept}


def fewer_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config with a small vocabulary."""
    return {**config, VOCABULARY: min(config[VOCABULARY], TOKENS)}


def safe_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config whose special tokens are in every vocabulary."""
    return {**config, **{key: 0 for key in _SPECIAL_TOKENS if isinstance(config.get(key), int)}}


def fewer_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config with twice as many experts as a token is sent to, whole groups of them."""
    experts = next((key for key in _EXPERTS if isinstance(config.get(key), int)), None)
    top_k = next((config[key] for key in _TOP_K if isinstance(config.get(key), int)), None)
    if experts is None or top_k is None:
        return dict(config)
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    per_group = max(math.ceil(2 * top_k / groups), math.ceil(top_k / chosen), 2)
    return {**config, experts: min(groups * per_group, config[experts])}


def narrower(config: Mapping[str, Any], divisor: int, axes: Collection[str]) -> dict[str, Any]:
    """A resolved config whose widths other than the ``axes`` are divided as far as they can be."""
    made = dict(config)
    own = {own_name(config, axis) for axis in axes}
    for key, width in config.items():
        if key.endswith(_WIDTHS) and key not in own and isinstance(width, int) and width:
            made[key] = width // math.gcd(width, divisor)
    return made


def head_counts(config: Mapping[str, Any]) -> dict[str, int]:
    """How many heads and key/value heads a resolved config has, under the library's common names."""
    return {
        name: config[own_name(config, name)] for name in _HEADS if isinstance(config.get(own_name(config, name)), int)
    }


def with_widths(config: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """A resolved config of other widths."""
    return {**config, **{own_name(config, axis): width for axis, width in widths.items()}}
