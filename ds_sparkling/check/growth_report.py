"""The check of a growth before it is paid for: grow a small instance, compare, and hold it against the promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ds_sparkling.check.modules import ModuleRms, rows
from ds_sparkling.check.promise import Promise, promise_of
from ds_sparkling.check.tally import Tally, tallies
from ds_sparkling.discovery.build import BuildModel, base_widths, build_on_meta, saved_buffers
from ds_sparkling.discovery.comparison import Runnable, compare, first_runnable, fitting_axes
from ds_sparkling.discovery.find_axes import axes_to_grow
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.discovery.layer_lists import layer_axes, refuse_layers
from ds_sparkling.discovery.proof import RefutedError, refuted
from ds_sparkling.discovery.reading import UnreadableError, read
from ds_sparkling.discovery.small_instance import Instance, instances
from ds_sparkling.discovery.trial import Trial, TrialModel
from ds_sparkling.growth import GrowthPlan, make_plan
from ds_sparkling.growth.plan_in_words import plan_in_words
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.strategy import Strategy
from ds_sparkling.text_tables import text_table


@dataclass(frozen=True, kw_only=True)
class GrowthReport:
    """What a growth does to a model.

    Attributes:
        plan: the growth of the model asked for.
        small: the growth of the instance that was run.
        note: how the instance differs from the model; empty if it is the model.
        dtype: what it was run in.
        rows: RMS before and after of every module shown.
        difference: largest difference of logits over the largest logit.
        tallies: what became of every kind of tensor of the instance.
        promise: what the strategy promises.
        broken: what isn't as promised, one line each.
    """

    plan: GrowthPlan
    small: GrowthPlan
    note: str
    dtype: torch.dtype
    rows: tuple[ModuleRms, ...]
    difference: float
    tallies: tuple[Tally, ...]
    promise: Promise
    broken: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return not self.broken

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON's types."""
        return {
            "plan": self.plan.to_dict(),
            "small": {
                "note": self.note,
                "widths": {growth.axis: [growth.before, growth.after] for growth in self.small.growths},
                "parameters": list(self.small.parameters()),
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            "modules": [{**asdict(row), "place": row.place.value, "ratio": row.ratio} for row in self.rows],
            "logit_difference": self.difference,
            "tensors": [tally.to_dict() for tally in self.tallies],
            "promise": {
                "text": self.promise.text,
                "logit_difference": self.promise.difference,
                "rms_ratio": {place.value: list(band) for place, band in self.promise.bands.items()},
            },
            "broken": list(self.broken),
            "kept": self.kept,
        }

    def describe(self) -> str:
        """The report as text: the plan, RMS per module, tensors, and the verdict."""
        narrow, wide = self.small.parameters()
        widths = ", ".join(f"{growth.axis} {growth.before} -> {growth.after}" for growth in self.small.growths)
        size = f"{narrow:,} -> {wide:,} parameters, {str(self.dtype).removeprefix('torch.')}"
        ran = f"ran a small instance ({self.note})" if self.note else "ran the model as it is"
        lines = [
            plan_in_words(self.plan),
            "",
            f"{ran}: {widths}; {size}",
            "",
            *self._modules(),
            "",
            *self._tensors(),
            "",
        ]
        lines.append(f"logits differ by {self.difference:.2g} of the largest")
        lines.append(f"promised: {self.promise.text}")
        lines += [f"BROKEN: {line}" for line in self.broken] or ["kept"]
        return "\n".join(lines)

    def _modules(self) -> list[str]:
        body = [
            (
                f"{row.module} ({row.kind})",
                f"{row.before:.4g}",
                f"{row.after:.4g}",
                f"{row.ratio:.4f}" + (f" ({row.expected:.4g} for the tied head)" if row.expected != 1 else ""),
            )
            for row in self.rows
        ]
        return text_table([("RMS of the output", "before", "after", "ratio"), *body], left=[0])

    def _tensors(self) -> list[str]:
        body = [
            (
                f"{tally.tensors} x {tally.name}",
                "x".join(map(str, tally.before)),
                "x".join(map(str, tally.after)),
                *(f"{count:,}" for count in (tally.old, tally.copied, tally.random, tally.zero)),
                f"{tally.rms_before:.4g}",
                f"{tally.rms_after:.4g}",
            )
            for tally in self.tallies
        ]
        header = ("tensors", "before", "after", "old", "copied", "random", "zero", "RMS before", "RMS after")
        return text_table([header, *body], left=[0])


def check_growth(
    build_model: BuildModel,
    widths: Mapping[str, int] | None,
    after: Mapping[str, int],
    strategy: Strategy | None = None,
    inputs: Inputs | None = None,
    *,
    hints: Mapping[str, ParamAxes] | None = None,
    as_is: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> GrowthReport:
    """Grow a model, small, and look at what it does to activations, logits and weights.

    The instance gets random parameters that all matter. Whatever the strategy, it is also shown that copying units
    keeps the function (:func:`~ds_sparkling.prove_function`): a model that scales by its own width breaks the promise.

    Args:
        build_model: builds the model from its widths.
        widths: the widths to start with; by default ``build_model``'s defaults or the built model's config's.
        after: the axes that grow, and their new widths.
        strategy: how they grow.
        inputs: of the model's forward: a mapping, a sequence or a tensor; random token ids by default.
        hints: what is known of parameters that can't be read, by patterns that match whole names.
        as_is: whether to run the model itself, however large, instead of a small instance.
        dtype: what to run in; float32 where the model's modules don't know it.
        seed: of parameters and token ids.

    Returns:
        What the growth did, what its strategy promises, and what of that is broken.

    Raises:
        PlanError: if the model can't grow so or can't be run; the message names what is in the way.
    """
    before = base_widths(build_model, after, widths)
    refuse_layers(after, layer_axes(build_model, before, after), "a run that plans it checks it at its start")
    strategy = strategy or Strategy()
    axes, refusal = _axes(build_model, before, after, strategy, inputs, hints)
    model = build_on_meta(build_model, before)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(model).items()}
    plan = make_plan(shapes, axes, before, after, strategy, number=1, active_share=None, buffers=buffers)
    whole = Instance(build_model, before, dict(after))
    small = [whole] if as_is else instances(build_model, before, after, keep_vocabulary=inputs is not None)
    runnable = first_runnable(small, inputs, dtype, seed)
    fitted = fitting_axes(runnable.instance, runnable.model, axes)
    if as_is and not refusal:
        refusal = _refuted(runnable, fitted)
    return _report(plan, runnable, fitted, strategy, refusal)


def _axes(
    build_model: BuildModel,
    before: Mapping[str, int],
    after: Mapping[str, int],
    strategy: Strategy,
    inputs: Inputs | None,
    hints: Mapping[str, ParamAxes] | None,
) -> tuple[dict[str, ParamAxes], str]:
    """The axes that keep the function; where none do, those that come nearest, and what is wrong with them."""
    try:
        return axes_to_grow(build_model, before, [after], [], strategy, hints, inputs).axes, ""
    except RefutedError as error:
        return error.axes, str(error)
    except UnreadableError as error:
        return read(build_model, before, hints).likeliest, str(error)


def _refuted(runnable: Runnable, axes: Mapping[str, ParamAxes]) -> str:
    """What is wrong with growing the model itself by copies; empty if that keeps the function."""
    twice = {axis: 2 * runnable.instance.before[axis] for axis in runnable.instance.after}
    trial = Trial(TrialModel(runnable), twice, Strategy(), "every unit copied")
    return "" if trial.difference(axes) <= trial.tolerance else str(refuted(trial, axes))


def _report(
    plan: GrowthPlan, runnable: Runnable, axes: Mapping[str, ParamAxes], strategy: Strategy, refusal: str
) -> GrowthReport:
    comparison = compare(runnable, axes, strategy)
    shown = rows(comparison.narrow, comparison.changes)
    promise = promise_of(comparison.plan, runnable.dtype)
    broken = list(promise.broken(comparison.difference, shown))
    return GrowthReport(
        plan=plan,
        small=comparison.plan,
        note=runnable.instance.note,
        dtype=runnable.dtype,
        rows=tuple(shown),
        difference=comparison.difference,
        tallies=tuple(tallies(comparison.narrow, comparison.wide, comparison.plan)),
        promise=promise,
        broken=tuple(broken + ([refusal] if refusal else [])),
    )
