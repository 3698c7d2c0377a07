"""How large the experiments are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.runs import Shape, TrainingRun, widths_of


@dataclass(frozen=True)
class Scale:
    """Sizes, lengths and learning rates of all experiments.

    Attributes:
        name: what the command calls it.
        shape: model and batch.
        hidden, inner: the narrow widths.
        steps: optimizer steps of a run.
        lr: peak learning rate of the narrow model, which the grown ones keep.
        lr_factors: peak rates tried for the models trained from scratch, over ``lr``.
        rewarmup_steps: tau_w.
        seeds: how many by default.
        horizon_shape: model and batch where the steps after the growth vary.
        horizons: those steps.
    """

    name: str
    shape: Shape
    hidden: int
    inner: int
    steps: int
    lr: float
    lr_factors: tuple[float, ...]
    rewarmup_steps: int
    seeds: int
    horizon_shape: Shape
    horizons: tuple[int, ...]

    def base(self, data: str, *, dense: bool = False) -> TrainingRun:
        """The narrow model, trained throughout."""
        shape = replace(self.shape, experts=1, top_k=1) if dense else self.shape
        inner = self.inner * (2 if dense else 1)
        widths = widths_of(hidden_size=self.hidden, moe_intermediate_size=inner)
        return TrainingRun(shape, widths, self.steps, self.lr, data=data)

    def horizon_base(self, data: str, horizon: int) -> TrainingRun:
        """The narrow model of a run with ``horizon`` steps before and after the growth."""
        return replace(self.base(data), shape=self.horizon_shape, steps=2 * horizon)


_SMALL = Shape(2, 4, 2, 16, experts=8, top_k=2, batch=8, length=128, windows=2048, curve_windows=256)
_TINY = Shape(1, 2, 1, 8, experts=4, top_k=2, batch=4, length=32, windows=64, curve_windows=32)
_MEDIUM = Shape(8, 8, 4, 64, experts=16, top_k=4, batch=32, length=512, windows=1024, curve_windows=128)

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="tiny",
            shape=_TINY,
            hidden=16,
            inner=8,
            steps=60,
            lr=1e-2,
            lr_factors=(0.5, 1.0, 2.0),
            rewarmup_steps=3,
            seeds=1,
            horizon_shape=_TINY,
            horizons=(20, 40),
        ),
        Scale(
            name="small",
            shape=_SMALL,
            hidden=64,
            inner=32,
            steps=2000,
            lr=5e-3,
            lr_factors=(0.35, 0.5, 0.71, 1.0, 1.41),
            rewarmup_steps=30,
            seeds=3,
            horizon_shape=replace(_SMALL, length=64, windows=4096, curve_windows=512),
            horizons=(500, 2000, 5000, 20000),
        ),
        Scale(
            name="medium",
            shape=_MEDIUM,
            hidden=512,
            inner=256,
            steps=20000,
            lr=1e-3,
            lr_factors=(0.35, 0.5, 0.71, 1.0, 1.41),
            rewarmup_steps=150,
            seeds=3,
            horizon_shape=_MEDIUM,
            horizons=(500, 2000, 5000, 20000),
        ),
    )
}
