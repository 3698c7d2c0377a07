"""Tell what a strategy promises of a growth, and whether it was kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_sparkling.check.modules import ModuleLevel, ModuleRms
from ds_sparkling.discovery.comparison import tolerance
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.growth.scaling import keeps_function, whole_ratios
from ds_sparkling.spec.strategy import Init, Scaling

#: RMS of a whole layer's output after over before, or its inverse. With scaling "rms" and copies or random units it was
#: within 0.95 .. 1.11 for the reference model of width 64, at ratios of 1.5, 2 and 3; what is left is chance, which
#: gets smaller with the width.
LAYER_BAND = 1.25
#: The same of everything else: an attention or MLP block alone adds less up, and was within 0.77 .. 1.31.
BLOCK_BAND = 1.5


@dataclass(frozen=True)
class Promise:
    """What holds right after a growth.

    Attributes:
        text: in words.
        difference: the most that logits may differ by, relative to the largest; None if that isn't promised.
        bands: lowest and highest ratio of RMS by the place of a module; places that aren't named have none.
    """

    text: str
    difference: float | None
    bands: dict[ModuleLevel, tuple[float, float]]

    def broken(self, difference: float, rows: Sequence[ModuleRms]) -> Iterator[str]:
        """What isn't as promised, one line each."""
        if self.difference is not None and not difference <= self.difference:
            yield f"logits differ by {difference:.2g} of the largest, promised is {self.difference:g}"
        for row in rows:
            low, high = self.bands.get(row.place, (0.0, math.inf))
            if not low <= row.ratio / row.expected <= high:
                wanted = f"{low * row.expected:.3g} to {high * row.expected:.3g}"
                yield f"{row.module}: the RMS ratio is {row.ratio:.3g}, promised is {wanted}"


def promise_of(plan: GrowthPlan, dtype: torch.dtype) -> Promise:
    """What the plan's strategy promises at its ratios, computed in ``dtype``.

    Copies at integer ratios, and scaling "function" at all ratios, keep the function. Scaling "rms" otherwise keeps
    RMS, up to chance. Units that are zero on one side, or cancel each other, are rescaled like random ones (App. B), so
    they start out up to ``sqrt(d/d')`` smaller per axis, and only whole layers are held to that. Scaling "none"
    promises nothing.
    """
    strategy = plan.strategy
    integer = whole_ratios(plan.growths)
    exact = tolerance(dtype)
    if keeps_function(strategy, integer):
        return Promise(f"the same function: logits differ by at most {exact:g} of the largest", exact, {})
    if strategy.scaling is Scaling.NONE:
        return Promise("nothing: scaling 'none' keeps neither the function nor RMS", None, {})
    if Init.ZERO in (strategy.fan_out, strategy.fan_in) or strategy.cancels:
        least = math.sqrt(math.prod(growth.before / growth.after for growth in plan.growths)) / LAYER_BAND
        return Promise(
            f"RMS of a layer's output, with units that add nothing at first: {least:.3g} to {LAYER_BAND:g} of before",
            None,
            {ModuleLevel.LAYER: (least, LAYER_BAND)},
        )
    return Promise(
        f"RMS of a layer's output within a factor of {LAYER_BAND:g}, of other modules' of {BLOCK_BAND:g}",
        None,
        {
            ModuleLevel.LAYER: (1 / LAYER_BAND, LAYER_BAND),
            ModuleLevel.BLOCK: (1 / BLOCK_BAND, BLOCK_BAND),
            ModuleLevel.OUTSIDE: (1 / BLOCK_BAND, BLOCK_BAND),
        },
    )
