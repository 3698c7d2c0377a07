"""What one training run is: everything that its result depends on, and nothing else."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ds_sparkling.spec.strategy import Rewarmup, Scope, Strategy

if TYPE_CHECKING:
    from ds_sparkling.spec.config import SparklingConfig

#: Of the learning-rate schedule, as in the paper's App. D.
WARMUP_SHARE, FINAL_RATIO = 0.03, 0.01
#: The width axes that grow here.
HIDDEN, INNER = "hidden_size", "moe_intermediate_size"


@dataclass(frozen=True)
class Shape:
    """The model but for its widths, the batch, and what validation reads.

    Attributes:
        layers, heads, kv_heads, head_dim, experts, top_k: of the OLMoE-style model. One expert makes it a dense one.
        batch: sequences per optimizer step.
        length: tokens per sequence.
        windows: validation sequences of a final loss.
        curve_windows: validation sequences of a point on a curve.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    batch: int
    length: int
    windows: int
    curve_windows: int

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch * self.length


Widths = tuple[tuple[str, int], ...]


def widths_of(**widths: int) -> Widths:
    """Widths as a hashable value."""
    return tuple(sorted(widths.items()))


@dataclass(frozen=True)
class Stage:
    """A growth: after ``at_step`` steps, to ``widths``."""

    at_step: int
    widths: Widths


@dataclass(frozen=True)
class TrainingRun:
    """One training run.

    Attributes:
        shape: of model and batch.
        widths: those it starts with.
        steps: optimizer steps, and the length of the learning-rate schedule.
        lr: peak learning rate of AdamW.
        muon_lr: that of Muon, whose updates have another scale.
        seed: of initial weights, data order and what the strategy draws.
        stages: its growths.
        block: the strategy as in the ``"sparkling"`` block, JSON.
        optimizer: "adamw"; "muon" is that for matrices, and AdamW for the rest.
        beta2: of AdamW.
        data: what it reads; told apart by its fingerprint, not by this.
    """

    shape: Shape
    widths: Widths
    steps: int
    lr: float
    seed: int = 0
    stages: tuple[Stage, ...] = ()
    block: str = "{}"
    optimizer: str = "adamw"
    beta2: float = 0.95
    data: str = ""
    muon_lr: float = 0.02

    @property
    def key(self) -> str:
        """A name for it, the same on every machine, and still the same when runs get to have more attributes."""
        told = {entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default} - {"data"}
        text = json.dumps({name: value for name, value in asdict(self).items() if name in told}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def trunk(self) -> TrainingRun:
        """The run that never grows, which this one is up to its first growth."""
        return replace(self, stages=(), block="{}")

    @property
    def first_growth(self) -> int | None:
        return self.stages[0].at_step if self.stages else None

    @property
    def warmup(self) -> int:
        """Steps of the learning rate's warm-up."""
        return max(1, round(WARMUP_SHARE * self.steps))

    def rate_at(self, step: float) -> float:
        """The base learning rate after ``step`` steps, over its peak."""
        from ds_sparkling.growth.schedule import warmup_cosine  # here, so that what a run is needs no torch

        return warmup_cosine(step, warmup=self.warmup, total=self.steps, start=0.0, peak=1.0, end=FINAL_RATIO)

    def at_rate(self, factor: float) -> TrainingRun:
        """The same at so many times the peak learning rates."""
        muon_lr = self.muon_lr * (factor if self.optimizer == "muon" else 1)
        return replace(self, lr=self.lr * factor, muon_lr=muon_lr)

    @property
    def config(self) -> SparklingConfig:
        """Strategy and growths as the engine's own configuration has them.

        Raises:
            ConfigError: as for the ``"sparkling"`` block.
        """
        from ds_sparkling.spec.config import SparklingConfig

        stages = [{"at_step": stage.at_step, "widths": dict(stage.widths)} for stage in self.stages]
        return SparklingConfig.from_dict({**json.loads(self.block), "seed": self.seed, "growths": stages})


def block_text(block: Mapping[str, Any]) -> str:
    """A ``"sparkling"`` block as a hashable value: what its strategy changes of the defaults, as far as that matters.

    Raises:
        ConfigError: as for the block of a DeepSpeed config.
    """
    from ds_sparkling.spec.config import SparklingConfig

    strategy = SparklingConfig.from_dict(block).strategy
    if strategy.rewarmup.scope is Scope.NONE:
        strategy = replace(strategy, rewarmup=Rewarmup(scope=Scope.NONE))
    return json.dumps(_changes(strategy.to_dict(), Strategy().to_dict()), sort_keys=True)


def _changes(found: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            if inner := _changes(value, default[key]):
                changes[key] = inner
        elif value != default[key]:
            changes[key] = value
    return changes


@dataclass(frozen=True)
class Point:
    """A point on a run's validation curve: after ``step`` steps and ``flops`` of training."""

    step: int
    flops: float
    loss: float
    twins: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        loss: final validation loss, nats per byte.
        before, after: validation loss right before and after the (last) growth.
        twins: mean cosine of copied units and their sources at the end; None if none were copied.
        drift: RMS(out)/RMS(in) of the blocks right after the growth over that before it, geometric mean.
        flops: training compute, 6 x active parameters x tokens (Eq. 29).
        seconds: processor time spent on training steps, on a GPU their wall-clock time.
        curve: points of the validation loss.
    """

    loss: float
    flops: float
    seconds: float
    before: float | None = None
    after: float | None = None
    twins: float | None = None
    drift: float | None = None
    curve: tuple[Point, ...] = ()

    @property
    def jump(self) -> float | None:
        """Change of the validation loss at the growth; None without one."""
        return None if self.before is None or self.after is None else self.after - self.before

    def loss_at(self, flops: float) -> float | None:
        """Validation loss when so much compute was spent, between two points of the curve; None beyond it."""
        for before, after in itertools.pairwise(self.curve):
            if before.flops <= flops <= after.flops and before.flops < after.flops:
                share = (flops - before.flops) / (after.flops - before.flops)
                return before.loss + share * (after.loss - before.loss)
        return None

    @property
    def shock(self) -> float | None:
        """The most that the validation loss ever was above that before the (last) growth, from there on."""
        if self.before is None or not math.isfinite(self.before):
            return None
        grown = max(place for place, point in enumerate(self.curve) if point.loss == self.before)
        return max(point.loss for point in self.curve[grown:]) - self.before

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """What ``dataclasses.asdict`` gave, through JSON."""
        return cls(**{**data, "curve": tuple(Point(**point) for point in data["curve"])})
