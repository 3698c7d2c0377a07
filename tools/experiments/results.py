"""From outcomes to tables: means and paired differences over seeds, with confidence intervals, and what holds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import special

from ds_sparkling.files import whole_file
from experiments.catalogue import Claim, Contender, Experiment, Lab
from experiments.runs import Outcome


def _t95(freedom: int) -> float:
    """Student's t for a two-sided interval of 95%."""
    return float(special.stdtrit(freedom, 0.975))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95% confidence interval; None where one seed gives none."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """None if there are no values."""
        if not values:
            return None
        if not all(map(math.isfinite, values)):  # of two infinite ones nan, where fmean would raise
            return cls(sum(values) / len(values), None, len(values))
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, len(values))
        return cls(mean, _t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def text(self, *, signed: bool = False) -> str:
        """Like ``1.2345 +-0.0012``."""
        number = f"{self.mean:+.4f}" if signed else f"{self.mean:.4f}"
        return number if self.half is None else f"{number} ±{self.half:.4f}"


@dataclass(frozen=True)
class VariantResult:
    """One variant's line.

    Attributes:
        variant: which.
        outcomes: by seed; None where the run isn't finished.
        loss: final validation loss.
        difference: of the final loss to the reference's, paired by seed; None for the reference itself.
    """

    variant: Contender
    outcomes: tuple[Outcome | None, ...]
    loss: Estimate | None
    difference: Estimate | None

    @property
    def finite(self) -> bool:
        """Whether there is a loss, and no run diverged."""
        return self.loss is not None and math.isfinite(self.loss.mean)

    def mean(self, name: str) -> float | None:
        """Mean of an outcome's attribute, or property, over the seeds that have it."""
        found = [getattr(outcome, name) for outcome in self.outcomes if outcome is not None]
        values = [value for value in found if value is not None]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Verdict:
    """Whether an ordering shows.

    Attributes:
        claim: the ordering.
        runs: which runs it is of, the better one's first; experiments may share it.
        difference: of the losses, paired by seed, better minus worse; None if there are none.
    """

    claim: Claim
    runs: tuple[str, ...]
    difference: Estimate | None

    @property
    def text(self) -> str:
        """In a few words."""
        if self.difference is None:
            return "not run"
        mean, half = self.difference.mean, self.difference.half
        if not math.isfinite(mean):
            return "a run diverged"
        if half is None:
            return ("as claimed" if mean < 0 else "the other way round") + " on one seed, which proves nothing"
        if abs(mean) <= half:
            return "not resolved: the interval includes zero"
        return "holds" if mean < 0 else "does NOT hold: the other way round"


@dataclass(frozen=True)
class Table:
    """An experiment's results."""

    experiment: Experiment
    rows: tuple[VariantResult, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def seeds(self) -> int:
        return len(self.rows[0].outcomes)

    @property
    def finished(self) -> bool:
        return all(outcome is not None for row in self.rows for outcome in row.outcomes)

    def write_csv(self, path: Path) -> None:
        """One line per run: variant, seed, and what came out."""
        names = ("loss", "before", "after", "shock", "twins", "drift", "flops", "seconds")
        with whole_file(path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["variant", "reference", "seed", "run", "lr", "steps", *names])
            for row in self.rows:
                runs = row.variant.runs(len(row.outcomes))
                for seed, (run, outcome) in enumerate(zip(runs, row.outcomes, strict=True)):
                    if outcome is None:
                        continue
                    values = [getattr(outcome, name) for name in names]
                    cells = ["" if value is None else f"{value:.6g}" for value in values]
                    writer.writerow(
                        [row.variant.name, row.variant.reference, seed, run.key, f"{run.lr:g}", run.steps, *cells]
                    )


def table_of(experiment: Experiment, lab: Lab) -> Table:
    """An experiment's results, as far as there are any."""
    variants = {variant.name: variant for variant in experiment.variants(lab)}
    outcomes = {
        name: [lab.outcomes.get(run.key) for run in variant.runs(lab.seeds)] for name, variant in variants.items()
    }

    def paired(first: str, second: str) -> Estimate | None:
        pairs = zip(outcomes.get(first, ()), outcomes.get(second, ()), strict=False)
        return Estimate.of([a.loss - b.loss for a, b in pairs if a is not None and b is not None])

    rows = [
        VariantResult(
            variant,
            tuple(outcomes[name]),
            Estimate.of([outcome.loss for outcome in outcomes[name] if outcome is not None]),
            paired(name, variant.reference) if variant.reference else None,
        )
        for name, variant in variants.items()
    ]
    verdicts = [
        Verdict(
            claim,
            tuple(variants[name].run.key for name in (claim.better, claim.worse) if name in variants),
            paired(claim.better, claim.worse),
        )
        for claim in experiment.claims
    ]
    return Table(experiment, tuple(rows), tuple(verdicts))


def fullest_table(experiment: Experiment, lab: Lab) -> Table:
    """The results with as many seeds as all variants have, those of ``lab`` at least."""
    table = table_of(experiment, lab)
    while (more := table_of(experiment, lab.with_seeds(table.seeds + 1))).finished:
        table = more
    return table
