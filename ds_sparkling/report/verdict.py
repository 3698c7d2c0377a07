"""Say in words what the runs show: each sentence with its figures, and never more than was recorded.

First comes what to buy: which run ended lowest among those that ended at the same compute. That growing is better than
not growing is only said where a run that never grew ended there, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from ds_sparkling.monitoring.alarms import DEAD_LOAD, PARTED_COSINE, locked
from ds_sparkling.report import facts
from ds_sparkling.report.events import ReadGrowth, ReadRun

#: A growth whose validation loss moves by less kept the function, as far as a loss can tell.
_KEPT = 1e-3
#: Activation RMS within this share of what it was before the growth is the same, measured on different batches.
_SAME_RMS = 0.05
#: Differences are beyond noise from twice their standard deviation on.
_SIGMAS = 2.0
#: Of more runs than these not every pair is compared at the same compute, but each with the best.
_ALL_PAIRS = 3
#: Runs whose compute differs by less ended at the same compute. A step more or less is nothing.
_SAME_COMPUTE = 0.01
#: Sentences on top; the rest is folded away.
_SHORT = 5


class Kind(Enum):
    """What a finding is: as it should be, something to look at, neither, or that something wasn't recorded."""

    GOOD = "good"
    WATCH = "watch"
    PLAIN = "plain"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One sentence or two of the verdict; ``lead`` if it is one of those to read first."""

    kind: Kind
    text: str
    lead: bool = False


def headline(runs: Sequence[ReadRun]) -> str:
    """What to buy at the budget: the compute that the lowest grown run spent, or else the lowest run of all."""
    ends = {run.name: facts.ending(run) for run in runs}
    ranked = sorted((run for run in runs if _finite(ends[run.name].loss)), key=lambda run: ends[run.name].loss or 0.0)
    if not ranked:
        return "No run has a validation loss to compare."
    best = next((run for run in ranked if run.growths), ranked[0])
    budget, loss = ends[best.name].compute, ends[best.name].loss
    if budget is None:
        return f"{ranked[0].name} ends lowest, at {ends[ranked[0].name].loss:.4f}; compute isn't recorded."
    rivals = [run for run in ranked if _at(ends[run.name].compute, budget)]
    first, *others = rivals
    open_question = ""
    if best.growths and all(run.growths or run.grown_elsewhere for run in rivals):
        open_question = "; no run that never grew ended there, so whether growing pays isn't shown"
    if not others:
        return f"{best.name} reaches a validation loss of {loss:.4f} at {budget:.3e} FLOPs{open_question}."
    second = others[0]
    gap = (ends[second.name].loss or 0.0) - (ends[first.name].loss or 0.0)
    band = _band(ends[first.name], ends[second.name])
    if band is not None and gap <= band:
        return (
            f"At {budget:.3e} FLOPs {first.name} and {second.name} can't be told apart: validation losses "
            f"{ends[first.name].loss:.4f} and {ends[second.name].loss:.4f}{open_question}."
        )
    return (
        f"At {budget:.3e} FLOPs buy {first.name}: validation loss {ends[first.name].loss:.4f}, {gap:.4f} below "
        f"{second.name}{open_question}."
    )


def shortlist(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Five findings to read first, and the rest: what to look at comes before what is well."""
    order = [
        *(finding for finding in findings if finding.lead and finding.kind is not Kind.GOOD),
        *(finding for finding in findings if finding.kind is Kind.WATCH and not finding.lead),
        *(finding for finding in findings if finding.lead and finding.kind is Kind.GOOD),
        *(finding for finding in findings if not finding.lead and finding.kind is not Kind.WATCH),
    ]
    first = order[:_SHORT]
    return first, [finding for finding in findings if finding not in first]


def verdict(runs: Sequence[ReadRun]) -> list[Finding]:
    """All findings, the comparison of the runs first."""
    findings = list(_comparison(runs))
    findings[:0] = [Finding(Kind.WATCH, f"{run.name}: {note}.", lead=True) for run in runs for note in run.notes]
    for run in runs:
        if run.growths:
            for part in (_function, _twins, _gradients, _updates):
                findings += part(run)
        elif run.grown_elsewhere:
            findings.append(
                Finding(
                    Kind.MISSING,
                    f"{run.name} has grown, but not while these files were written (offline, or in another directory), "
                    "so what the growth did isn't known.",
                )
            )
        findings += [*_activations(run), *_experts(run)]
    return findings


# -- which run ends lowest --------------------------------------------------------------------------------------


def _comparison(runs: Sequence[ReadRun]) -> Iterator[Finding]:
    ends = {run.name: facts.ending(run) for run in runs}
    for name in (name for name, end in ends.items() if end.loss is None):
        yield Finding(
            Kind.MISSING, f"{name} has no {facts.VALIDATION}, so how it ends can't be compared; validate at the end."
        )
    losses = {name: end.loss for name, end in ends.items() if end.loss is not None}
    for name in [name for name, loss in losses.items() if not math.isfinite(loss)]:
        yield Finding(Kind.WATCH, f"{name} has diverged: its last validation loss is {losses.pop(name)}.")
    ranked = sorted((run for run in runs if run.name in losses), key=lambda run: losses[run.name])
    if not ranked:
        return
    best, others = ranked[0], ranked[1:]
    end = ends[best.name]
    if not others:
        yield Finding(Kind.PLAIN, f"{best.name} ends at a validation loss of {end.loss:.4f}{_spent(end)}.", lead=True)
        return
    yield Finding(Kind.PLAIN, f"{best.name} ends lowest: validation loss {end.loss:.4f}{_spent(end)}.", lead=True)
    for other in others:
        yield _against(best, end, other, ends[other.name])
    yield from _controls(ranked, ends)
    pairs = [pair for pair in itertools.permutations(ranked, 2) if len(ranked) <= _ALL_PAIRS or best in pair]
    same = [finding for a, b in pairs for finding in _same_compute(a, ends[a.name], b, ends[b.name])]
    yield from same
    if same:
        yield Finding(
            Kind.PLAIN,
            "The dearer runs were then still on their way: where the learning rate decays to the end of each run, the "
            "same compute favours the one that had ended.",
        )
    yield Finding(
        Kind.PLAIN,
        "Noise here is how the last validations scatter. How much other seeds would change, one run of each can't say.",
        lead=True,
    )


def _controls(ranked: Sequence[ReadRun], ends: Mapping[str, facts.Ending]) -> Iterator[Finding]:
    """Each grown run against those that never grew and ended at its compute, if there are any."""
    never_grew = [run for run in ranked if not run.growths and not run.grown_elsewhere]
    alone = []
    for grown in (run for run in ranked if run.growths and ends[run.name].compute is not None):
        end = ends[grown.name]
        controls = [run for run in never_grew if _at(ends[run.name].compute, end.compute)]
        if not controls:
            alone.append(grown.name)
        for control in controls:
            its = ends[control.name]
            gap, band = (its.loss or 0.0) - (end.loss or 0.0), _band(end, its)
            noise = "" if band is None else f" (noise ±{band:.4f})"
            yield Finding(
                Kind.PLAIN,
                f"At the same compute {control.name}, which never grew, ends at {its.loss:.4f}{_spent(its)}, and "
                f"{grown.name} at {end.loss:.4f}{_spent(end)}: growing is {abs(gap):.4f} "
                f"{'lower' if gap > 0 else 'higher'}{noise}.",
                lead=True,
            )
    if alone:
        yield Finding(
            Kind.PLAIN,
            f"No run that never grew ended at the compute of {', '.join(alone)}, so whether growing was its best use "
            "isn't shown: train the narrow model longer, to the same compute (ds-sparkling compare does).",
            lead=True,
        )


def _at(compute: float | None, budget: float | None) -> bool:
    """Whether a run's compute is the budget."""
    return compute is not None and bool(budget) and abs(compute / (budget or 1.0) - 1) <= _SAME_COMPUTE


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _band(end: facts.Ending, its: facts.Ending) -> float | None:
    """What two endings may differ by through the scatter of validations; None if it isn't known."""
    if end.scatter is None or its.scatter is None:
        return None
    return _SIGMAS * float((end.scatter**2 + its.scatter**2) ** 0.5)


def _against(best: ReadRun, end: facts.Ending, other: ReadRun, its: facts.Ending) -> Finding:
    assert end.loss is not None
    assert its.loss is not None
    gap = its.loss - end.loss
    text = f"{other.name} ends {gap:.4f} higher, at {its.loss:.4f}{_spent(its)}"
    if end.compute and its.compute:
        text += f", {its.compute / end.compute:.2f} of the compute of {best.name}"
    if end.tokens is not None and its.tokens is not None and abs(its.tokens / (end.tokens or 1) - 1) > 0.01:
        text += ", not at the same number of tokens"
    band = _band(end, its)
    if band is None:
        return Finding(Kind.PLAIN, f"{text}. Too few validations since the last growth to tell that from noise.")
    if gap <= band:
        return Finding(
            Kind.PLAIN, f"{text}. That is within noise (±{band:.4f}): neither is better, as far as this shows."
        )
    return Finding(Kind.PLAIN, f"{text}. That is beyond noise (±{band:.4f}).")


def _same_compute(cheap: ReadRun, end: facts.Ending, dear: ReadRun, its: facts.Ending) -> Iterator[Finding]:
    """What the dearer run had reached when it had spent what the cheaper one spent in all."""
    if end.compute is None or its.compute is None or end.loss is None or end.compute > 0.99 * its.compute:
        return
    loss = facts.loss_at(dear, end.compute)
    if loss is None:
        return
    order = "below" if end.loss < loss else "above"
    yield Finding(
        Kind.PLAIN,
        f"At the compute that {cheap.name} spent in all, {end.compute:.3e} FLOPs, {dear.name} stood at {loss:.4f}: "
        f"{cheap.name} is {abs(end.loss - loss):.4f} {order} it.",
    )


def _spent(end: facts.Ending) -> str:
    parts = []
    if end.tokens is not None:
        parts.append(f"{end.tokens:,.0f} tokens")
    if end.compute is not None:
        parts.append(f"{end.compute:.3e} FLOPs")
    return f" after {' and '.join(parts)}" if parts else " (tokens and compute aren't recorded)"


# -- what a growth did ------------------------------------------------------------------------------------------


def _function(run: ReadRun) -> Iterator[Finding]:
    for jump in facts.jumps(run):
        where = f"{run.name}, {_growth(jump.growth)}"
        if jump.size is None:
            yield Finding(
                Kind.MISSING,
                f"{where}: validation loss wasn't taken both right before and right after it, so whether the function "
                "was kept can't be told; validate on both sides of a growth, as ds_sparkling/train.py does.",
            )
        else:
            kept = abs(jump.size) <= _KEPT
            yield Finding(
                Kind.GOOD if kept else Kind.WATCH,
                f"{where} {'kept' if kept else 'changed'} the function: validation loss {jump.before:.4f} before, "
                f"{jump.after:.4f} after ({'no difference' if jump.size == 0 else f'{jump.size:+.1e}'}).",
                lead=True,
            )
        yield from _bump(run, jump)


def _bump(run: ReadRun, jump: facts.Jump) -> Iterator[Finding]:
    """A rise of the loss in training on, as a re-warm-up brings it."""
    bump = facts.bump(run, jump)
    if bump is None or jump.before is None or bump.peak - jump.before <= _KEPT:
        return
    text = (
        f"{run.name}: in training on after growth {jump.growth.number} the validation loss rose by "
        f"{bump.peak - jump.before:.4f}, to {bump.peak:.4f}"
    )
    if not bump.back:
        yield Finding(Kind.WATCH, f"{text}, and it hasn't come back to what it was.")
    else:
        after = "" if bump.tokens is None else f" {bump.tokens:,.0f} tokens after the growth"
        yield Finding(Kind.PLAIN, f"{text}; it had come back{after} (at the first validation that shows it).")


def _twins(run: ReadRun) -> Iterator[Finding]:
    span = facts.since_growth(run, "twins/cosine")
    if span is None:
        yield Finding(
            Kind.MISSING,
            f"{run.name}: no twins/cosine since its last growth, so whether copied units part isn't known.",
        )
        return
    if span.points < 2:
        yield Finding(Kind.MISSING, f"{run.name}: twins were looked at once only, right at the growth.")
        return
    told = f"mean cosine of copied units to their sources {span.first:.4f} at first, {span.last:.4f} in the end"
    closest = facts.since_growth(run, "twins/cosine_max")
    if closest is not None:
        told += f" (closest pair {closest.last:.4f})"
    if locked(span.last, span.earlier):
        yield Finding(Kind.WATCH, f"{run.name}: twins are locked, {told}: the copies learn nothing of their own.")
    elif span.last > PARTED_COSINE:
        yield Finding(Kind.PLAIN, f"{run.name}: twins are still parting, {told}.")
    else:
        yield Finding(Kind.GOOD, f"{run.name}: twins have parted, {told}.", lead=True)


def _gradients(run: ReadRun) -> Iterator[Finding]:
    span = facts.since_growth(run, "twins/gradient_cosine")
    if span is not None:
        same = locked(span.last, span.earlier)
        what = "the same gradients" if same else "gradients of their own"
        yield Finding(
            Kind.WATCH if same else Kind.GOOD,
            f"{run.name}: twins get {what}, mean cosine {span.first:.4f} at first, {span.last:.4f} in the end.",
        )


def _updates(run: ReadRun) -> Iterator[Finding]:
    old, new = (facts.since_growth(run, f"update_rms/{which}") for which in ("old", "new"))
    if old is not None and new is not None and old.first > 0 and old.last > 0:
        yield Finding(
            Kind.PLAIN,
            f"{run.name}: the update of new elements has {new.first / old.first:.2f} times the RMS of the old ones' "
            f"when first looked at after the growth, {new.last / old.last:.2f} times in the end.",
        )


# -- activations and experts ------------------------------------------------------------------------------------


def _activations(run: ReadRun) -> Iterator[Finding]:
    """Of each block the RMS that comes out over the RMS that goes in; without that, what comes out alone."""
    measure = "out over in" if run.family("activation_ratio") else "out"
    blocks = run.family("activation_ratio") or run.family("activation_rms")
    for growth in run.growths:
        ratios = {block: ratio for block, curve in blocks.items() if (ratio := facts.at_growth(curve, growth))}
        if not ratios:
            yield Finding(
                Kind.MISSING, f"{run.name}, {_growth(growth)}: activation RMS wasn't recorded both before and after it."
            )
            continue
        worst = max(ratios, key=lambda block: abs(ratios[block] - 1))
        told = f"RMS {measure} of {len(ratios)} blocks became {_range(ratios.values())} times what it was"
        if abs(ratios[worst] - 1) <= _SAME_RMS:
            yield Finding(Kind.GOOD, f"{run.name}, {_growth(growth)} kept the activations: {told}.")
        else:
            yield Finding(
                Kind.WATCH, f"{run.name}, {_growth(growth)} moved the activations: {told}, furthest in {worst}."
            )
    drift = facts.last_values(run, "activation_drift")
    if drift:
        yield Finding(
            Kind.PLAIN,
            f"{run.name}: in the end RMS out over in is {_range(drift.values())} times what it was before the last "
            "growth; training moves it, too.",
        )


def _range(values: Collection[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _experts(run: ReadRun) -> Iterator[Finding]:
    loads = facts.last_values(run, "router/load_min")
    if not loads:
        return
    dead = facts.dead_blocks(run)
    highest = facts.last_values(run, "router/load_max")
    told = f"least load {min(loads.values()):.2f} of an even one"
    if highest:
        told += f", highest {max(highest.values()):.2f}"
    if dead:
        yield Finding(Kind.WATCH, f"{run.name}: an expert is dead in {', '.join(dead)}; {told}.")
    elif min(loads.values()) < DEAD_LOAD:
        yield Finding(Kind.PLAIN, f"{run.name}: an expert got nothing lately, not yet long enough to be dead; {told}.")
    else:
        yield Finding(Kind.GOOD, f"{run.name}: no expert is dead, {told}, at the last measurement.")


def _growth(growth: ReadGrowth) -> str:
    return f"growth {growth.number}"
