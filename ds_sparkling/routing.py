"""How much of a mixture-of-experts model one token uses."""

from __future__ import annotations

from torch import nn


def active_share(model: nn.Module) -> float | None:
    """Share of the stacked experts that one token uses (top-k over experts), from the model's config.

    Returns:
        None if the config doesn't tell, or the model has none.
    """
    config = getattr(model, "config", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        experts = getattr(config, name, None)
        if isinstance(experts, int) and isinstance(top_k, int):
            return top_k / experts
    return None
