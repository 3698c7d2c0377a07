"""The page of results: a section per experiment with its table, its plot, and what of the paper's orderings shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ds_sparkling.files import whole_file
from experiments.plots import draw, draw_overview
from experiments.results import Estimate, Table, VariantResult, Verdict
from experiments.runs import Shape
from experiments.scales import Scale


def write_page(output: Path, scale: Scale, tables: Sequence[Table]) -> Path:
    """Write CSV files, plots and ``README.md`` into ``output``; of experiments of which nothing is there, only a line.

    Returns:
        The page.

    Raises:
        SparklingError: if matplotlib isn't installed or a file can't be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    for table in tables:
        if any(row.loss for row in table.rows):
            table.write_csv(output / f"{table.experiment.name}.csv")
            draw(table, output / f"{table.experiment.name}.png")
            if table.experiment.name == "iso-compute":
                draw_overview(table, output / "overview.png")
    page = output / "README.md"
    with whole_file(page) as part:
        part.write_text("\n".join(_lines(scale, tables)) + "\n")
    return page


def _lines(scale: Scale, tables: Sequence[Table]) -> Iterator[str]:
    yield f"# The paper's experiments at scale `{scale.name}`"
    yield ""
    command = f"python tools/reproduce.py --scale {scale.name}"
    yield f"Made by `{command}`. `runs.jsonl` has every run whole, the CSV files one line for each."
    yield ""
    yield from _setup(scale)
    yield ""
    if any(table.experiment.name == "iso-compute" and table.rows[0].loss for table in tables):
        yield "![what models cost and how well they do](overview.png)"
        yield ""
    yield from _summary(tables)
    for table in tables:
        yield ""
        yield from _section(table)


def _setup(scale: Scale) -> Iterator[str]:
    shape = scale.shape
    factors = ", ".join(f"{factor:g}" for factor in scale.lr_factors)
    yield (
        f"Byte-level text, {_model(shape)}, narrow widths hidden {scale.hidden} and inner {scale.inner}, doubled by a "
        f"growth after half of {scale.steps} steps of {shape.batch} x {shape.length} bytes. AdamW (0.9, 0.95), weight "
        f"decay 0.1, peak learning rate {scale.lr:g} for narrow and grown models, 3% warm-up, cosine to 1%; re-warm-up "
        f"in {scale.rewarmup_steps} steps. Models trained from scratch get the best of {factors} times that rate, by "
        "the mean over the seeds, and beyond these while the best is the lowest or the highest."
    )
    yield ""
    yield (
        f"Losses are nats per byte over the same {shape.windows * shape.length:,} held-out bytes. A seed fixes initial "
        "weights, data order and what a strategy draws; all variants of a seed that grow a narrow run of the same kind "
        "branch off the same one, and all read the same batches, so differences are paired by seed. ± is the 95% "
        "confidence interval of the mean over seeds (Student's t). Jump is the change of the validation loss at the "
        "growth, shock the most that it is above its value before the growth at any later point; twins, the mean "
        "cosine between copied units and their sources at the end, over the rows that produce them; drift, "
        "RMS(out)/RMS(in) of the blocks right after the growth over that before; time, where it is asked for, that of "
        "the processor in training steps. Percentages beside compute and time are against the reference."
    )


def _model(shape: Shape) -> str:
    return f"{shape.layers} layers, {shape.heads} heads, {shape.experts} experts of which {shape.top_k} per token"


def _summary(tables: Sequence[Table]) -> Iterator[str]:
    yield "| experiment | paper | orderings that hold | not resolved | the other way round |"
    yield "|---|---|---|---|---|"
    for table in tables:
        title, name = table.experiment.title, table.experiment.name
        if not any(row.loss for row in table.rows):
            yield f"| {title} | {table.experiment.source} | not run: `python tools/reproduce.py {name}` | | |"
            continue
        cells = [str(count) if table.verdicts else "" for count in _counts(table.verdicts)]
        state = "" if table.finished else " (unfinished)"
        yield f"| [{title}](#{_anchor(title)}){state} | {table.experiment.source} | {' | '.join(cells)} |"
    # Experiments share some orderings, under other names.
    verdicts = {verdict.runs: verdict for table in tables for verdict in table.verdicts if len(verdict.runs) == 2}
    for whose in dict.fromkeys(verdict.claim.source for verdict in verdicts.values()):
        cells = [str(count) for count in _counts([v for v in verdicts.values() if v.claim.source == whose])]
        yield f"| all, each once | {whose} | {' | '.join(cells)} |"


def _counts(verdicts: Sequence[Verdict]) -> list[int]:
    """How many orderings hold, how many aren't resolved, and how many are the other way round."""
    return [sum(v.text.startswith(start) for v in verdicts) for start in ("holds", "not resolved", "does NOT")]


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _section(table: Table) -> Iterator[str]:
    experiment = table.experiment
    yield f"## {experiment.title}"
    yield ""
    yield f"{experiment.question} ({experiment.source}; `python tools/reproduce.py {experiment.name}`)"
    if experiment.setup:
        yield experiment.setup
    yield ""
    if not any(row.loss for row in table.rows):
        yield "Not run yet."
        return
    columns = ["variant", "seeds", "loss", "against the reference", "jump", "shock", "twins", "drift", "compute, FLOPs"]
    columns += ["time, s"] if experiment.timed else []
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    rows = {row.variant.name: row for row in table.rows}
    for row in table.rows:
        # Where compute is what is compared, with its ratio to the reference's.
        yield _line(row, rows.get(row.variant.reference) if experiment.by_compute else None, timed=experiment.timed)
    yield from _sweeps(table)
    if experiment.by_compute:
        yield from _on_the_way(table, rows)
    if table.verdicts:
        yield ""
        yield "| claimed to be lower | than | by | difference | |"
        yield "|---|---|---|---|---|"
        for verdict in table.verdicts:
            difference = verdict.difference.text(signed=True) if verdict.difference else ""
            claim = verdict.claim
            yield f"| {claim.better} | {claim.worse} | {claim.source} | {difference} | {verdict.text} |"
    yield ""
    yield f"![{experiment.title}]({experiment.name}.png)"


def _sweeps(table: Table) -> Iterator[str]:
    """Which learning rates won their sweeps, and whether others might have done better still."""
    for row in table.rows:
        name = row.variant.name
        tried = [other.variant.run.lr for other in table.rows if other.variant.name.startswith(f"{name}, lr x")]
        if tried:
            best = row.variant.run.lr
            edge = (
                ", at the end of the sweep: a rate beyond it might do better"
                if best in (min(tried), max(tried))
                else ""
            )
            yield ""
            yield f"{name}: the best peak learning rate is {best:g}, of {', '.join(f'{lr:g}' for lr in tried)}{edge}."


def _on_the_way(table: Table, rows: Mapping[str, VariantResult]) -> Iterator[str]:
    """How far models that grow end from where dearer ones, which don't, stood at the same compute."""
    for row in table.rows:
        reference = rows.get(row.variant.reference)
        if reference is None or row.variant.run.stages:
            continue
        gaps, places = [], []
        rivals = [reference, *(other for other in table.rows if other.variant.reference == row.variant.reference)]
        for rival in [rival for rival in rivals if rival.variant.run.stages]:
            pairs = [(a, b) for a, b in zip(row.outcomes, rival.outcomes, strict=True) if a and b and b.curve]
            stood = [(a.loss_at(b.flops), b.curve[-1].loss) for a, b in pairs if a.flops > b.flops]
            gap = Estimate.of([end - loss for loss, end in stood if loss is not None])
            if gap is not None:
                gaps.append(f"{rival.variant.name} {gap.text(signed=True)}")
                run, (a, b) = row.variant.run, pairs[0]
                step = run.steps * b.flops / a.flops
                places.append(
                    f"after {step:.0f} of {run.steps} steps, the learning rate at {run.rate_at(step):.0%} of its peak"
                )
        if gaps:
            yield ""
            yield (
                f"From where {row.variant.name} stood when it had spent as much compute "
                f"({', or '.join(dict.fromkeys(places))}), others end at: {', '.join(gaps)} (paired by "
                f"seed; over the {row.variant.run.shape.curve_windows} windows of the curves)."
            )


def _line(row: VariantResult, reference: VariantResult | None, *, timed: bool) -> str:
    variant = row.variant
    finished = sum(outcome is not None for outcome in row.outcomes)
    jump, shock, twins, drift = (row.mean(name) for name in ("jump", "shock", "twins", "drift"))
    cells = [
        variant.name if variant.reference or variant.swept else f"**{variant.name}**",
        f"{finished}/{len(row.outcomes)}",
        row.loss.text() if row.loss else "",
        f"{row.difference.text(signed=True)}" if row.difference else "",
        _number(jump, "+.4f"),
        _number(shock, "+.4f"),
        _number(twins, ".3f"),
        _number(drift, ".3f"),
        _cost(row, reference, "flops", ".3g"),
    ]
    cells += [_cost(row, reference, "seconds", ".0f")] if timed else []
    return f"| {' | '.join(cells)} |"


def _cost(row: VariantResult, reference: VariantResult | None, name: str, how: str) -> str:
    """What a row spent, and how much more or less than the reference."""
    spent, theirs = row.mean(name), None if reference is None else reference.mean(name)
    ratio = "" if spent is None or not theirs else f" ({spent / theirs - 1:+.0%})"
    return _number(spent, how) + ratio


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
