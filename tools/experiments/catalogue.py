"""The experiments: which variants each compares, and which orderings the paper reports for them.

Strategies are the files in ``configs/strategies``, or changes to one of them, so what is measured here is what a user's
JSON holds. Variants that depend on results (the best learning rate of a model trained from scratch, the step at which
it reaches a loss) come up once those are known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_sparkling.errors import SparklingError
from ds_sparkling.spec.json_files import load_json
from ds_sparkling.spec.strategy import INIT_PAIRS, OptimizerState, Rewarmup
from experiments.runs import HIDDEN, INNER, Outcome, Stage, TrainingRun, block_text, widths_of
from experiments.scales import Scale

STRATEGIES = Path(__file__).parents[2] / "configs" / "strategies"

#: How many learning rates a sweep may have beyond the scale's.
_MORE_RATES = 4

Block = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One line of an experiment's table.

    Attributes:
        name: of the line.
        run: its run with the first seed.
        reference: the line that it is compared with, seed by seed; none for that line itself.
        swept: whether it is one of a sweep, whose best one has a line of its own.
        series, x: where the experiment is a curve over a quantity, which one it is on, and where.
    """

    name: str
    run: TrainingRun
    reference: str = ""
    swept: bool = False
    series: str = ""
    x: float | None = None

    def runs(self, seeds: int) -> list[TrainingRun]:
        """Its run with each of so many seeds."""
        return [replace(self.run, seed=seed) for seed in range(seeds)]


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper reports (or that we do): ``better`` ends at a lower loss than ``worse``."""

    better: str
    worse: str
    source: str = "the paper"


class Lab:
    """What experiments are made of: a scale, a corpus, how many seeds, and the outcomes so far."""

    def __init__(self, scale: Scale, data: str, seeds: int, outcomes: Mapping[str, Outcome]) -> None:
        self.scale = scale
        self.data = data
        self.seeds = seeds
        self.outcomes = outcomes

    def with_seeds(self, seeds: int) -> Lab:
        """The same with so many seeds."""
        return Lab(self.scale, self.data, seeds, self.outcomes)

    @property
    def narrow(self) -> TrainingRun:
        return self.scale.base(self.data)

    def wide(self, axis: str, base: TrainingRun | None = None, factor: float = 2) -> dict[str, int]:
        """The widths of ``axis`` ("inner", "hidden" or "joint") grown by ``factor``."""
        axes = {"inner": [INNER], "hidden": [HIDDEN], "joint": [HIDDEN, INNER]}[axis]
        widths = dict((base or self.narrow).widths)
        return {name: round(widths[name] * factor) for name in axes}

    def grown(
        self, axis: str, block: Block, base: TrainingRun | None = None, share: float = 0.5, factor: float = 2
    ) -> TrainingRun:
        """``base`` (the narrow run) with a growth after ``share`` of its steps."""
        base = base or self.narrow
        stage = Stage(round(share * base.steps), widths_of(**self.wide(axis, base, factor)))
        return replace(base, stages=(stage,), block=block_text(block))

    def scratch(self, axis: str, base: TrainingRun | None = None, factor: float = 2) -> TrainingRun:
        """The wide model trained throughout, at the narrow one's learning rate."""
        base = base or self.narrow
        return replace(base, widths=widths_of(**{**dict(base.widths), **self.wide(axis, base, factor)}))

    def at_compute_of(self, grown: TrainingRun, run: TrainingRun) -> TrainingRun:
        """A run over as many steps, and on a schedule as long, as take the compute that ``grown`` takes in all."""
        from experiments.loop import active_parameters  # here, so that the list of experiments needs no torch

        widths, begin, spent = dict(grown.widths), 0, 0
        for stage in (*grown.stages, Stage(grown.steps, ())):
            spent += (stage.at_step - begin) * active_parameters(grown.shape, widths)
            begin = stage.at_step
            widths.update(stage.widths)
        return replace(run, steps=round(spent / active_parameters(run.shape, dict(run.widths))))

    def sweep(self, run: TrainingRun) -> dict[float, float | None]:
        """The learning rates of a sweep, as factors on the run's own, with the mean final losses as far as known.

        While the lowest loss is that of the lowest or of the highest rate, the sweep goes on beyond it.
        """
        losses = {factor: self._mean_loss(run.at_rate(factor)) for factor in sorted(self.scale.lr_factors)}
        for _ in range(_MORE_RATES):
            best, lowest, highest = _best(losses), min(losses), max(losses)
            if best is None or lowest < best < highest:
                break
            beyond = float(f"{best / math.sqrt(2) if best == lowest else best * math.sqrt(2):.2g}")
            losses[beyond] = self._mean_loss(run.at_rate(beyond))
        return dict(sorted(losses.items()))

    def _mean_loss(self, run: TrainingRun) -> float | None:
        """Of the final losses over the seeds; None until all are known."""
        outcomes = [self.outcomes.get(replace(run, seed=seed).key) for seed in range(self.seeds)]
        losses = [outcome.loss for outcome in outcomes if outcome is not None]
        return statistics.fmean(losses) if len(losses) == self.seeds else None

    def tuned(self, run: TrainingRun) -> TrainingRun | None:
        """A run at the learning rate that ends lowest in the mean over the seeds; None until the sweep is done."""
        best = _best(self.sweep(run))
        return None if best is None else run.at_rate(best)

    def from_scratch(self, name: str, run: TrainingRun, reference: str = "") -> Iterator[Contender]:
        """The sweep over a run's learning rate, and the run at the best one."""
        losses = self.sweep(run)
        for factor in losses:
            yield Contender(f"{name}, lr x{factor:g}", run.at_rate(factor), swept=True)
        best = _best(losses)
        if best is not None:
            yield Contender(name, run.at_rate(best), reference)

    def recipe(self, name: str, **changes: Any) -> Block:
        """A strategy of ``configs/strategies``, with the scale's re-warm-up steps and ``changes`` merged in.

        Steps of a decay after it are brought to the scale, too.

        Raises:
            SparklingError: if there is no such file.
        """
        path = STRATEGIES / f"{name}.json"
        try:
            block: Block = load_json(path)
        except OSError as error:
            raise SparklingError(f"{path} can't be read ({error.strerror}): run this from a checkout") from None
        except ValueError as error:
            raise SparklingError(f"{path}: {error}") from None
        if block["rewarmup"].get("steps"):
            block["rewarmup"]["steps"] = self.scale.rewarmup_steps
        for key, value in changes.items():
            block[key] = {**block[key], **value} if isinstance(value, dict) else value
        if block["rewarmup"].get("decay_steps"):
            share = self.scale.rewarmup_steps / Rewarmup.steps
            block["rewarmup"]["decay_steps"] = round(block["rewarmup"]["decay_steps"] * share)
        return block


def _best(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest loss; None until all are known."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if len(known) == len(losses) else None


@dataclass(frozen=True)
class Experiment:
    """A question, the variants that answer it, and what the paper says.

    Attributes:
        name: what the command calls it.
        title: of its section.
        source: figure or table of the paper.
        question: in one sentence.
        variants: its lines.
        claims: orderings to be checked.
        xlabel: of the quantity that variants are a curve over, if they are.
        by_compute: whether its plot is of losses by training compute, and not of differences by steps.
        timed: whether times are asked for; they compare only where all runs were made on one machine.
        setup: where its runs are not those of the other experiments.
    """

    name: str
    title: str
    source: str
    question: str
    variants: Callable[[Lab], Iterator[Contender]]
    claims: tuple[Claim, ...] = ()
    xlabel: str = ""
    by_compute: bool = False
    timed: bool = False
    setup: str = ""


NO_REWARMUP = {"scope": "none"}
RATIO_3: Block = {"rewarmup": {"ratio": 3.0}}
DECAYING: Block = {"rewarmup": {"ratio": 3.0, "curve": "factor", "decay_steps": 8000}}
AXES = ("inner", "hidden", "joint")


def _init(lab: Lab) -> Iterator[Contender]:
    for axis in ("inner", "hidden"):
        reference = f"{axis}: copy-copy, rms"
        for fan_out, fan_in in INIT_PAIRS[:5]:
            for scaling in ("rms", "none"):
                name = f"{axis}: {fan_out.value}-{fan_in.value}, {scaling}"
                init = {"fan_out": fan_out.value, "fan_in": fan_in.value}
                run = lab.grown(axis, lab.recipe("sparkling", init=init, scaling=scaling))
                yield Contender(name, run, "" if name == reference else reference)


def _state(lab: Lab) -> Iterator[Contender]:
    reference = OptimizerState.ASYMMETRIC_RESET.value
    for state in OptimizerState:
        block = lab.recipe("sparkling", optimizer_state=state.value, rewarmup=NO_REWARMUP)
        yield Contender(state.value, lab.grown("inner", block), "" if state.value == reference else reference)


def _rewarmup(lab: Lab) -> Iterator[Contender]:
    for axis in AXES:
        reference = f"{axis}: new elements (SPARKLING)"
        yield Contender(reference, lab.grown(axis, lab.recipe("sparkling")))
        yield Contender(f"{axis}: none", lab.grown(axis, lab.recipe("sparkling", rewarmup=NO_REWARMUP)), reference)
        yield Contender(f"{axis}: all elements", lab.grown(axis, lab.recipe("rewarmup-all")), reference)


def _search(lab: Lab) -> Iterator[Contender]:
    steps = lab.scale.rewarmup_steps
    reference = "ratio 1.3"
    for ratio in (1.0, 1.1, 1.25, 1.3, 1.5, 2.0, 3.0):
        name, block = f"ratio {ratio:g}", lab.recipe("sparkling", rewarmup={"ratio": ratio})
        grown = lab.grown("inner", block)
        yield Contender(name, grown, "" if name == reference else reference, series="ratio", x=ratio)
    for text, factor in (("no", 0.0), ("1/3 of the", 1 / 3), ("3x the", 3.0), ("10x the", 10.0)):
        block = lab.recipe("sparkling", rewarmup={"steps": round(steps * factor)})
        yield Contender(f"{reference}, {text} steps", lab.grown("inner", block), reference)


def _ablation(lab: Lab) -> Iterator[Contender]:
    dynamics = {
        "neither": ("none", "copy", NO_REWARMUP),
        "RMS only": ("rms", "copy", NO_REWARMUP),
        "asymmetry only": ("none", "asymmetric_reset", {}),
        "both": ("rms", "asymmetric_reset", {}),
    }
    for pair in ("copy-copy", "zero-copy", "random-copy"):
        fan_out, fan_in = pair.split("-")
        for name, (scaling, state, rewarmup) in dynamics.items():
            block = lab.recipe(
                "sparkling",
                init={"fan_out": fan_out, "fan_in": fan_in},
                scaling=scaling,
                optimizer_state=state,
                rewarmup=rewarmup,
            )
            yield Contender(f"{pair}: {name}", lab.grown("inner", block), "" if name == "both" else f"{pair}: both")


def _init_rivals(lab: Lab) -> Iterator[Contender]:
    reference = "SPARKLING"
    yield Contender(reference, lab.grown("inner", lab.recipe("sparkling")))
    for name in (
        "naive",
        "function-preserving",
        "perturbation",
        "random-split",
        "uneven-split",
        "function-preserving-random",
    ):
        yield Contender(name, lab.grown("inner", lab.recipe(name)), reference)
    for text, init in (("1:2 split", {"split": "1:2"}), ("+-0.1 perturbation", {"perturbation": 0.1})):
        yield Contender(f"SPARKLING + {text}", lab.grown("inner", lab.recipe("sparkling", init=init)), reference)


def _dynamics_rivals(lab: Lab) -> Iterator[Contender]:
    reference = "SPARKLING"
    sparkling = lab.grown("inner", lab.recipe("sparkling"))
    yield Contender(reference, sparkling)
    yield Contender("re-warm-up of all", lab.grown("inner", lab.recipe("rewarmup-all")), reference)
    yield Contender("uneven split, 25% faster decay", lab.grown("inner", lab.recipe("lemon")), reference)
    faster = lab.recipe("lemon", rewarmup={"faster_decay": 0.5})
    yield Contender("uneven split, 50% faster decay", lab.grown("inner", faster), reference)
    variance = lab.recipe("variance-transfer")
    yield Contender("cancelling random, rates by weight norm", lab.grown("inner", variance), reference)
    yield from lab.from_scratch("from scratch", lab.scratch("inner"), reference)
    step = _step_at_loss(lab, sparkling)
    if step is not None:
        staged = lab.recipe("staged-training", rewarmup={"from_step": step})
        yield Contender("scaled state, remapped lr", lab.grown("inner", staged), reference)


def _step_at_loss(lab: Lab, grown: TrainingRun) -> int | None:
    """The step at which the model trained from scratch (first seed) has the loss that ``grown`` has at its growth."""
    growth, best = lab.outcomes.get(grown.key), lab.tuned(lab.scratch("inner"))
    if growth is None or growth.after is None or best is None:
        return None
    curve = lab.outcomes[best.key].curve
    target = growth.after
    before = None
    for point in curve:
        if point.loss <= target:
            if before is None:
                return point.step
            share = (before.loss - target) / (before.loss - point.loss)
            return round(before.step + share * (point.step - before.step))
        before = point
    return curve[-1].step


def _muon(lab: Lab) -> Iterator[Contender]:
    base = replace(lab.narrow, optimizer="muon")
    reference = "SPARKLING"
    yield Contender(reference, lab.grown("inner", lab.recipe("sparkling"), base))
    yield Contender(
        "momentum reset, no re-warm-up",
        lab.grown("inner", lab.recipe("sparkling", rewarmup=NO_REWARMUP), base),
        reference,
    )
    yield Contender("momentum copied", lab.grown("inner", lab.recipe("function-preserving"), base), reference)
    dropped = lab.recipe("function-preserving", optimizer_state="drop")
    yield Contender("momentum dropped", lab.grown("inner", dropped, base), reference)
    yield Contender("narrow, never grown", base, reference)
    yield from lab.from_scratch("from scratch", lab.scratch("inner", base), reference)


def _dense(lab: Lab) -> Iterator[Contender]:
    base = lab.scale.base(lab.data, dense=True)
    reference = "SPARKLING"
    grown, scratch = lab.grown("inner", lab.recipe("sparkling"), base), lab.scratch("inner", base)
    yield Contender(reference, grown)
    yield Contender("function-preserving", lab.grown("inner", lab.recipe("function-preserving"), base), reference)
    yield Contender("narrow, never grown", base, reference)
    yield from lab.from_scratch("from scratch, same compute", lab.at_compute_of(grown, scratch), reference)
    yield from lab.from_scratch("from scratch, same tokens", scratch, reference)


def _two_stage(lab: Lab) -> Iterator[Contender]:
    base, reference = lab.narrow, "two stages, SPARKLING"
    inner = dict(base.widths)[INNER]
    first = Stage(base.steps // 4, widths_of(**{INNER: 2 * inner}))
    second = Stage(base.steps // 2, widths_of(**{INNER: 4 * inner}))
    grown, plain = (
        replace(base, stages=(first, second), block=block_text(lab.recipe(recipe)))
        for recipe in ("sparkling", "function-preserving")
    )
    scratch = lab.scratch("inner", factor=4)
    yield Contender(reference, grown)
    yield Contender("two stages, function-preserving", plain, reference)
    yield Contender("one stage, SPARKLING", lab.grown("inner", lab.recipe("sparkling"), factor=4), reference)
    yield from lab.from_scratch("from scratch, same compute", lab.at_compute_of(grown, scratch), reference)
    yield from lab.from_scratch("from scratch, same tokens", scratch, reference)


def _iso_compute(lab: Lab) -> Iterator[Contender]:
    base = lab.narrow
    for axis in AXES:
        scratch, reference = lab.scratch(axis), f"{axis}: SPARKLING"
        grown = lab.grown(axis, lab.recipe("sparkling"))
        yield Contender(reference, grown)
        yield Contender(f"{axis}: SPARKLING, ratio 3", lab.grown(axis, lab.recipe("sparkling", **RATIO_3)), reference)
        yield Contender(f"{axis}: parting", lab.grown(axis, lab.recipe("parting")), reference)
        yield Contender(f"{axis}: function-preserving", lab.grown(axis, lab.recipe("function-preserving")), reference)
        yield from lab.from_scratch(f"{axis}: from scratch, same compute", lab.at_compute_of(grown, scratch), reference)
        yield from lab.from_scratch(f"{axis}: from scratch, same tokens", scratch, reference)
        yield Contender(f"{axis}: narrow, same compute", lab.at_compute_of(grown, base), reference)
    yield Contender("narrow, never grown", base, "inner: SPARKLING")


def _savings(lab: Lab) -> Iterator[Contender]:
    for axis in AXES:
        reference = f"{axis}: from scratch"
        yield from lab.from_scratch(reference, lab.scratch(axis))
        yield Contender(f"{axis}: SPARKLING", lab.grown(axis, lab.recipe("sparkling")), reference)


#: Strategies that keep the function and part twins sooner, as changes to SPARKLING.
CANDIDATES: dict[str, Block] = {
    "SPARKLING": {},
    "ratio 2": {"rewarmup": {"ratio": 2.0}},
    "ratio 3": RATIO_3,
    "ratio 5": {"rewarmup": {"ratio": 5.0}},
    "all elements, ratio 3": {"rewarmup": {"ratio": 3.0, "scope": "all"}},
    "ratio 3, decaying": DECAYING,
    "split 1:0": {"init": {"split": "1:0"}},
    "split 1:0, ratio 3": {"init": {"split": "1:0"}, "rewarmup": {"ratio": 3.0}},
    "perturbation 1": {"init": {"perturbation": 1.0}},
    "perturbation 1, ratio 2": {"init": {"perturbation": 1.0}, "rewarmup": {"ratio": 2.0}},
    "perturbation 1, ratio 3": {"init": {"perturbation": 1.0}, "rewarmup": {"ratio": 3.0}},
    "perturbation 1, ratio 3, decaying": {"init": {"perturbation": 1.0}, **DECAYING},
    "cancelling random": {"init": {"fan_in": "cancel", "fan_out": "random"}, "scaling": "none"},
    "cancelling random, ratio 3": {
        "init": {"fan_in": "cancel", "fan_out": "random"},
        "scaling": "none",
        "rewarmup": {"ratio": 3.0},
    },
}


def _parting(lab: Lab) -> Iterator[Contender]:
    for axis in ("inner", "hidden"):
        for name, changes in CANDIDATES.items():
            if axis == "hidden" and "random" in name:
                continue  # random units change what the norms on the hidden width divide by
            block = lab.recipe("sparkling", **changes)
            reference = f"{axis}: SPARKLING"
            yield Contender(f"{axis}: {name}", lab.grown(axis, block), "" if name == "SPARKLING" else reference)


#: Those that did best at a short horizon with the first seed, which are compared at others.
FINALISTS = (
    "SPARKLING",
    "ratio 3",
    "ratio 3, decaying",
    "perturbation 1, ratio 3",
    "perturbation 1, ratio 3, decaying",
    "cancelling random, ratio 3",
)


def _horizons(lab: Lab) -> Iterator[Contender]:
    for horizon in lab.scale.horizons:
        base = lab.scale.horizon_base(lab.data, horizon)
        reference = f"{horizon} steps: SPARKLING"
        for name in FINALISTS:
            run = lab.grown("inner", lab.recipe("sparkling", **CANDIDATES[name]), base)
            yield Contender(
                f"{horizon} steps: {name}", run, "" if name == "SPARKLING" else reference, series=name, x=horizon
            )


def _bias_correction(lab: Lab) -> Iterator[Contender]:
    for beta2 in (0.95, 0.999):
        base = replace(lab.narrow, beta2=beta2)
        for mode in ("restart", "inherit"):
            block = lab.recipe("sparkling", bias_correction=mode)
            reference = "" if mode == "restart" else f"beta2 {beta2:g}: restart"
            yield Contender(f"beta2 {beta2:g}: {mode}", lab.grown("inner", block, base), reference)


def _ratio(lab: Lab) -> Iterator[Contender]:
    for axis in ("inner", "hidden"):
        for scaling in ("rms", "function", "none"):
            block = lab.recipe("sparkling", scaling=scaling)
            reference = "" if scaling == "rms" else f"{axis} 1.5x: rms"
            yield Contender(f"{axis} 1.5x: {scaling}", lab.grown(axis, block, factor=1.5), reference)


def _when(lab: Lab) -> Iterator[Contender]:
    reference = "50%"
    for percent in (10, 25, 50, 75, 90):
        run = lab.grown("inner", lab.recipe("sparkling"), share=percent / 100)
        yield Contender(f"{percent}%", run, "" if percent == 50 else reference, series="SPARKLING", x=percent)
    yield from lab.from_scratch("from scratch", lab.scratch("inner"), reference)


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "init",
            "RMS scaling and init pairs",
            "Fig. 1, Fig. 6",
            "Does RMS scaling help, whatever new units start from?",
            _init,
            tuple(
                Claim(f"{axis}: {pair}, rms", f"{axis}: {pair}, none")
                for axis in ("inner", "hidden")
                for pair in ("copy-copy", "random-random", "random-zero", "random-copy", "zero-copy")
            ),
        ),
        Experiment(
            "state",
            "Optimizer state at the growth",
            "Fig. 2",
            "Which treatment of AdamW's moments lets copies part from their sources?",
            _state,
            (
                Claim("asymmetric_reset", "copy"),
                Claim("asymmetric_reset", "drop"),
            ),
        ),
        Experiment(
            "rewarmup",
            "Re-warm-up after the growth",
            "Fig. 3",
            "Does a learning-rate re-warm-up help, and is it to be for new elements alone?",
            _rewarmup,
            tuple(
                Claim(f"{axis}: new elements (SPARKLING)", f"{axis}: {other}")
                for axis in AXES
                for other in ("none", "all elements")
            ),
        ),
        Experiment(
            "search",
            "Ratio and steps of the re-warm-up",
            "Fig. 9",
            "How high and how quick should the re-warm-up be?",
            _search,
            tuple(
                Claim("ratio 1.3", other)
                for other in ("ratio 1", "ratio 1.5", "ratio 2", "ratio 3", "ratio 1.3, 10x the steps")
            ),
            "ratio",
        ),
        Experiment(
            "ablation",
            "Ablation",
            "Table 6",
            "What do RMS scaling and the asymmetric dynamics add, alone and together?",
            _ablation,
            tuple(
                Claim(f"{pair}: both", f"{pair}: {other}")
                for pair in ("copy-copy", "zero-copy", "random-copy")
                for other in ("neither", "RMS only", "asymmetry only")
            ),
        ),
        Experiment(
            "init-rivals",
            "Other function-preserving inits",
            "Fig. 10, App. J",
            "Is SPARKLING better than inits that break the symmetry by themselves?",
            _init_rivals,
            tuple(
                Claim("SPARKLING", other)
                for other in ("naive", "function-preserving", "perturbation", "random-split", "uneven-split")
            ),
        ),
        Experiment(
            "dynamics-rivals",
            "Other training dynamics",
            "Fig. 11, App. K",
            "Is SPARKLING better than other schedules and treatments of state?",
            _dynamics_rivals,
            tuple(
                Claim("SPARKLING", other)
                for other in (
                    "re-warm-up of all",
                    "uneven split, 25% faster decay",
                    "cancelling random, rates by weight norm",
                    "scaled state, remapped lr",
                )
            ),
        ),
        Experiment(
            "muon",
            "Muon",
            "Fig. 12",
            "Does it hold for an optimizer that orthogonalises whole matrices?",
            _muon,
            (Claim("SPARKLING", "momentum copied"), Claim("SPARKLING", "momentum dropped")),
            setup="Muon steps the matrices in the layers, and AdamW the rest. The sweep from scratch scales the rates "
            "of both; narrow and grown models have Muon's at 0.02, which no sweep has chosen.",
        ),
        Experiment(
            "dense",
            "A dense model",
            "Table 8",
            "Does it hold without experts?",
            _dense,
            tuple(
                Claim("SPARKLING", other)
                for other in ("function-preserving", "narrow, never grown", "from scratch, same compute")
            ),
            setup="One expert of twice the inner width, which every token uses.",
        ),
        Experiment(
            "two-stage",
            "Growing twice",
            "Fig. 13, App. O",
            "Does growing twice (at a quarter and at half of the steps) still work?",
            _two_stage,
            tuple(
                Claim("two stages, SPARKLING", other)
                for other in ("two stages, function-preserving", "from scratch, same compute")
            ),
            by_compute=True,
        ),
        Experiment(
            "iso-compute",
            "Against training from scratch",
            "Fig. 14-16",
            "At the same compute, and at the same tokens, which ends lower?",
            _iso_compute,
            (
                *(Claim(f"{axis}: SPARKLING", f"{axis}: from scratch, same compute") for axis in AXES),
                *(Claim(f"{axis}: SPARKLING", f"{axis}: narrow, same compute", "ours") for axis in AXES),
                *(Claim(f"{axis}: parting", f"{axis}: SPARKLING", "ours") for axis in AXES),
                *(Claim(f"{axis}: parting", f"{axis}: from scratch, same compute", "ours") for axis in AXES),
            ),
            by_compute=True,
        ),
        Experiment(
            "savings",
            "Compute and time saved",
            "Table 2",
            "What does growing at half of the tokens save?",
            _savings,
            by_compute=True,
            timed=True,
        ),
        Experiment(
            "parting",
            "Beyond the paper: parting twins sooner",
            "ours",
            "At a short horizon, which changes part the twins and lower the loss without changing the function?",
            _parting,
            tuple(
                Claim(f"{axis}: {better}", f"{axis}: SPARKLING", "ours")
                for axis in ("inner", "hidden")
                for better in ("ratio 3", "split 1:0", "perturbation 1", "perturbation 1, ratio 3")
            )
            + tuple(
                Claim(f"{axis}: perturbation 1, ratio 3", f"{axis}: ratio 3", "ours") for axis in ("inner", "hidden")
            ),
        ),
        Experiment(
            "horizons",
            "Beyond the paper: the horizon",
            "ours",
            "How many steps after the growth does each strategy need?",
            _horizons,
            (),
            "steps after the growth",
            setup="As many steps before the growth as after it, with sequences of half the length.",
        ),
        Experiment(
            "bias-correction",
            "Beyond the paper: bias correction",
            "ours",
            "Should Adam's bias correction restart for new elements?",
            _bias_correction,
        ),
        Experiment(
            "ratio",
            "Beyond the paper: ratio 1.5",
            "ours",
            "Where Eq. 16 doesn't keep the function, is keeping it better than keeping RMS?",
            _ratio,
        ),
        Experiment(
            "when",
            "Beyond the paper: when to grow",
            "ours",
            "At which share of the budget?",
            _when,
            (),
            "growth at % of the steps",
        ),
    )
}
