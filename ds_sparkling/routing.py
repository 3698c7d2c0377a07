"""How much of a mixture-of-experts model one token uses."""

from __future__ import annotations

from torch import nn


def chosen_experts(model: nn.Module) -> int | None:
    """How many experts a token is routed to, from the model's config; None if it doesn't tell."""
    top_k = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    return top_k if isinstance(top_k, int) else None


def active_share(model: nn.Module) -> float | None:
    """Share of the stacked experts that one token uses (top-k over experts), from the model's config.

    Returns:
        None if the config doesn't tell, or the model has none.
    """
    config = getattr(model, "config", None)
    top_k = chosen_experts(model)
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        experts = getattr(config, name, None)
        if isinstance(experts, int) and top_k is not None:
            return top_k / experts
    return None
