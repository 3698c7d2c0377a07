"""Event files as runs write them, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ds_sparkling.spec.run_summary import RunSummary

#: Samples and tokens of an optimizer step, and steps of a run.
SAMPLES, TOKENS, STEPS = 16, 2048, 100
#: What the run's job leaves at its end.
SUMMARY = RunSummary(
    variant="grown",
    validation_loss=1.5,
    steps=STEPS,
    tokens=TOKENS * STEPS,
    flops=1e9,
    seconds=12.0,
    parameters=9000,
    active_parameters=3000,
)
#: Active parameters before and after the growth, and when it is.
NARROW, WIDE, GROWN_AT = 1000, 3000, 50


class Point(NamedTuple):
    tag: str
    samples: int
    value: float


def write(directory: Path, points: Sequence[Point], plan: tuple[str, int] | None = None) -> None:
    """One more event file in ``directory``, and in it the points in this order, after the plan (text, samples)."""
    writer = SummaryWriter(str(directory))
    if plan is not None:
        writer.add_text("Growth/plan", f"```\n{plan[0]}\n```", plan[1])
    for point in points:
        writer.add_scalar(point.tag, point.value, point.samples)
    writer.close()


def spent(step: int, grown_at: int | None, width: int = NARROW) -> list[Point]:
    """Tokens and compute after ``step`` steps."""
    before = step if grown_at is None else min(step, grown_at)
    flops = 6.0 * TOKENS * (width * before + WIDE * (step - before))
    return [
        Point("Train/tokens", SAMPLES * step, TOKENS * step),
        Point("Train/compute_flops", SAMPLES * step, flops),
    ]


def loss_at(step: int) -> float:
    """A loss that goes down smoothly."""
    return 1.0 + 4.0 * float(np.exp(-step / 30))


#: The points of a grown run's two files.
Files = tuple[list[Point], list[Point]]


def grown(directory: Path, *parts: Files) -> None:
    """A grown run, in two files."""
    write(directory, [point for first, _ in parts for point in first])
    later = [*growth_mark(), *(point for _, second in parts for point in second)]
    write(directory, later, ("growth 1: <hidden_size> 8 -> 16", SAMPLES * GROWN_AT))


def job(shift: float = 0.0, jump: float = 0.0) -> Files:
    """What the main job writes without its diagnosis; ``shift`` is added to all losses."""
    first: list[Point] = []
    second = [Point("Validation/loss", SAMPLES * GROWN_AT, loss_at(GROWN_AT) + shift + jump)]
    for step in range(10, STEPS + 1, 10):
        file = first if step <= GROWN_AT else second
        file += [Point("Train/loss", SAMPLES * step, loss_at(step) + shift), *spent(step, GROWN_AT)]
        file += [Point("Validation/loss", SAMPLES * step, loss_at(step) + shift)]
        file += [Point("Train/Samples/lr", SAMPLES * step, 1e-3)]
        if step > GROWN_AT:
            file += [Point("lr/old", SAMPLES * step, 1e-3), Point("lr/new", SAMPLES * step, 1.3e-3)]
            file += [Point("update_rms/old", SAMPLES * step, 1e-4), Point("update_rms/new", SAMPLES * step, 2e-4)]
    return first, second


def growth_mark(samples: int = SAMPLES * GROWN_AT) -> list[Point]:
    return [
        Point("Growth/number", samples, 1),
        Point("Growth/parameters", samples, 9000),
        Point("Growth/active_parameters", samples, WIDE),
        Point("Growth/hidden_size", samples, 16),
    ]


def from_scratch(directory: Path, shift: float = 0.0) -> None:
    """A run of the wide model that never grows."""
    points = []
    for step in range(10, STEPS + 1, 10):
        points += [Point(tag, SAMPLES * step, loss_at(step) + shift) for tag in ("Train/loss", "Validation/loss")]
        points += spent(step, None, WIDE)
    write(directory, points)


def diagnosis(twins: float = 0.9, rms: float = 1.0, least_load: float = 0.5) -> Files:
    """What the diagnosis adds; ``twins`` is the cosine at the end, ``rms`` what the growth multiplies RMS by."""
    first: list[Point] = []
    second: list[Point] = []
    for step in range(10, STEPS + 1, 10):
        since = step > GROWN_AT
        file, samples = (second if since else first), SAMPLES * step
        for block in ("layers.0", "layers.1"):
            file += [
                Point(f"activation_rms/{block}", samples, 2.0 * (rms if since else 1)),
                Point(f"activation_ratio/{block}", samples, 1.5 * (rms if since else 1)),
                Point(f"router/entropy/{block}", samples, 1.9),
                Point(f"router/load_max/{block}", samples, 1.7),
                Point(f"router/load_min/{block}", samples, least_load),
            ]
            if since:
                file += [Point(f"activation_drift/{block}", samples, rms)]
        file += [Point("effective_rank/layers.0.q_proj.weight", samples, 12.0)]
        if since:
            cosine = 1.0 + (twins - 1.0) * (step - GROWN_AT) / (STEPS - GROWN_AT)
            file += [Point(f"twins/{name}", samples, cosine) for name in ("cosine", "cosine_max", "gradient_cosine")]
            file += [Point(f"lr/birth_{birth}", samples, (1 + 0.3 * birth) * 1e-3) for birth in (0, 1)]
    return first, second
