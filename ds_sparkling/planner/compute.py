"""Training compute of a run that grows: Eq. 29, for any number of growths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ds_sparkling.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """Which model is trained on which part of the tokens.

    Attributes:
        name: what a table calls it.
        active: active parameters from the start, after the first growth, after the second ... (N).
        shares: share of all tokens seen at each growth (D_e / D).
    """

    name: str
    active: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.active) != len(self.shares) + 1:
            raise ConfigError(f"{len(self.shares)} growths need {len(self.shares) + 1} models, got {len(self.active)}")
        if any(first >= second for first, second in itertools.pairwise((0.0, *self.shares, 1.0))):
            raise ConfigError(f"growths must come one after the other, at shares between 0 and 1; got {self.shares}")

    def flops(self, tokens: float) -> float:
        """Training FLOPs, ``C = 6 sum_i N_i D_i`` with ``D_i`` the tokens of the i-th model (Eq. 29)."""
        spans = itertools.pairwise((0.0, *self.shares, 1.0))
        return sum(
            6.0 * active * tokens * (stop - start) for active, (start, stop) in zip(self.active, spans, strict=True)
        )

    @property
    def saved(self) -> float:
        """Share of the compute saved against training the last model throughout."""
        return 1.0 - self.flops(1.0) / (6.0 * self.active[-1])


def sweep(before: int, after: int, shares: Sequence[float]) -> list[Recipe]:
    """One growth from ``before`` to ``after`` active parameters, at each of ``shares`` of the tokens."""
    return [Recipe(f"{share:.0%}", (before, after), (share,)) for share in shares]
