"""Tell how much of a mixture-of-experts model one token uses."""

from __future__ import annotations

from torch import nn


def chosen_experts(model: nn.Module) -> int | None:
    """How many experts a token is routed to, from the model's config; None if it doesn't tell."""
    return _number(model, "num_experts_per_tok")


def active_share(model: nn.Module) -> float | None:
    """Share of the stacked experts that one token uses (top-k over experts), from the model's config.

    Returns:
        None if the config doesn't tell, or the model has none.
    """
    top_k, experts = chosen_experts(model), _number(model, "num_experts", "n_routed_experts", "num_local_experts")
    return None if top_k is None or experts is None else top_k / experts


def doubt_of_share(share: float | None, *, stacked: bool) -> str | None:
    """Why the experts that a token uses can't be told from the others; None if they can, or there are none.

    Args:
        share: what :func:`active_share` gives.
        stacked: whether the model has parameters that stack experts.
    """
    if stacked and share is None:
        return (
            "the model's config doesn't tell how many of its experts a token uses (num_experts_per_tok and "
            "num_experts, n_routed_experts or num_local_experts)"
        )
    if not stacked and share is not None and share < 1:
        return "the model's config has experts, but no parameter stacks them as [experts, out, in]"
    return None


def _number(model: nn.Module, *names: str) -> int | None:
    """The first of these that the model's config has, or that of its text model."""
    config = getattr(model, "config", None)
    found = (getattr(part, name, None) for part in (config, getattr(config, "text_config", None)) for name in names)
    return next((number for number in found if isinstance(number, int)), None)
