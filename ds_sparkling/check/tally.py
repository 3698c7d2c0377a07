"""Count what a growth did to each kind of tensor: how much of it is old, copied, random or zero, and its RMS."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_sparkling.growth import GrowthPlan, GrowthTables, Widener


@dataclass(frozen=True, kw_only=True)
class Tally:
    """All tensors of one kind together.

    Attributes:
        name: their name, ``*`` for the numbers of layers.
        tensors: how many there are.
        before, after: shape of one of them.
        old: elements that were there before, rescaled or not.
        copied: new elements that are made of old ones, as copies are.
        random: new elements that were drawn.
        zero: new elements that are zero.
        rms_before, rms_after: root mean square of their elements.
    """

    name: str
    tensors: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    old: int
    copied: int
    random: int
    zero: int
    rms_before: float
    rms_after: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "before": list(self.before), "after": list(self.after)}


def tallies(narrow: nn.Module, wide: nn.Module, plan: GrowthPlan) -> list[Tally]:
    """A :class:`Tally` per kind of tensor whose shape or values the growth changes, in the model's order."""
    before, after = dict(narrow.named_parameters()), dict(wide.named_parameters())
    kinds: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for param in plan.params:
        if param.grows or not torch.equal(before[param.name], after[param.name]):
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", param.name)
            kinds.setdefault((pattern, param.before, param.after), []).append(param.name)
    tables = GrowthTables(plan)

    def member(name: str) -> tuple[Tensor, Tensor, Widener]:
        return before[name].detach(), after[name].detach(), Widener(plan, name, tables=tables)

    return [_tally(kind, list(map(member, names))) for kind, names in kinds.items()]


def _tally(kind: tuple[str, tuple[int, ...], tuple[int, ...]], members: list[tuple[Tensor, Tensor, Widener]]) -> Tally:
    old = len(members) * math.prod(kind[1])
    kept, drawn, zero = (sum(counts) for counts in zip(*(_counts(*member) for member in members), strict=True))
    return Tally(
        name=kind[0],
        tensors=len(members),
        before=kind[1],
        after=kind[2],
        old=old,
        copied=kept - old,
        random=drawn,
        zero=zero,
        rms_before=_rms(narrow for narrow, _, _ in members),
        rms_after=_rms(wide for _, wide, _ in members),
    )


def _counts(narrow: Tensor, wide: Tensor, widener: Widener) -> tuple[int, int, int]:
    """How many elements come from old ones, are drawn, and are zero, read off from the growth itself.

    What comes from old elements changes its sign with them; what is drawn does not. The old elements hold no zero.
    """
    mirrored = torch.empty(wide.numel(), dtype=wide.dtype)
    widener.weight(-narrow, mirrored)
    zero = int((wide == 0).sum())
    kept = int((mirrored.view_as(wide) == -wide).sum()) - zero
    return kept, wide.numel() - kept - zero, zero


def _rms(tensors: Iterator[Tensor]) -> float:
    total, count = 0.0, 0
    for tensor in tensors:
        total += float(tensor.double().square().sum())
        count += tensor.numel()
    return math.sqrt(total / max(count, 1))
