"""A planning as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ds_sparkling.planner.assumptions import Assumptions
from ds_sparkling.planner.compute import Recipe, sweep
from ds_sparkling.planner.costs import Cost, cost
from ds_sparkling.planner.memory import Footprint, Memory
from ds_sparkling.planner.recipes import alternatives, equal_share, planned
from ds_sparkling.planner.subject import PlannedRun
from ds_sparkling.text_tables import text_table

#: Shares of the tokens that the table of growth steps has.
SHARES = tuple(tenth / 10 for tenth in range(1, 10))

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Planning:
    """What the planner found.

    Attributes:
        subject: what was planned.
        assumed: what the pauses rest on.
        recipe: the run as planned.
        sweep: one growth from the first to the last widths, at :data:`SHARES`.
        others: other ways to the same model.
        costs: of the planned growths, in order.
    """

    subject: PlannedRun
    assumed: Assumptions
    recipe: Recipe
    sweep: list[Recipe]
    others: list[Recipe]
    costs: list[Cost]

    @classmethod
    def make(cls, subject: PlannedRun, two_stage: tuple[float, float], assumed: Assumptions) -> Planning:
        """Plan everything.

        Args:
            two_stage: shares of the tokens at the growths of two-stage recipes.
        """
        recipe = planned(subject)
        return cls(
            subject=subject,
            assumed=assumed,
            recipe=recipe,
            sweep=sweep(recipe.active[0], recipe.active[-1], SHARES),
            others=alternatives(subject, two_stage),
            costs=[cost(subject, growth, assumed) for growth in subject.growths],
        )

    def describe(self) -> str:
        """Everything as text."""
        parts = [self._head(), self._compute(), self._recipes()]
        parts += [self._growth(number, found) for number, found in enumerate(self.costs, start=1)]
        return "\n\n".join([*parts, self._assumptions()])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON's types: bytes, seconds, FLOPs, shares."""
        subject, model = self.subject, self.subject.model
        sizes = [model.widths, *(growth.widths for growth in subject.growths)]
        return {
            "config": subject.name,
            "tokens": subject.tokens,
            "steps": subject.steps,
            "setting": asdict(subject.setting),
            "parameters": [{"total": model.parameters(at), "active": model.active(at), "widths": at} for at in sizes],
            "planned": self._recipe_dict(self.recipe),
            "one_growth": [self._recipe_dict(recipe) for recipe in self.sweep],
            "recipes": [self._recipe_dict(recipe) for recipe in self.others],
            "growths": [
                {"share": growth.share, "step": self._step(growth.share), "widths": growth.after, **_cost_dict(found)}
                for growth, found in zip(subject.growths, self.costs, strict=True)
            ],
            "assumptions": asdict(self.assumed),
        }

    def _recipe_dict(self, recipe: Recipe) -> dict[str, Any]:
        return {
            **asdict(recipe),
            "steps": [self._step(share) for share in recipe.shares],
            "flops": recipe.flops(self.subject.tokens),
            "saved": recipe.saved,
            "equal_share": equal_share(recipe),
        }

    def _head(self) -> str:
        subject, setting = self.subject, self.subject.setting
        steps = "" if subject.steps is None else f" in {subject.steps:,} steps"
        shared = f", experts over {setting.expert_parallel}" if setting.expert_parallel > 1 else ""
        offload = "".join(
            f", {what} on the host"
            for what, on in (("optimizer", setting.offload_optimizer), ("weights", setting.offload_weights))
            if on
        )
        counts = [("", "total", "active", "widths")]
        sizes = [subject.model.widths, *(growth.widths for growth in subject.growths)]
        for number, widths in enumerate(sizes):
            text = ", ".join(f"{axis} {width}" for axis, width in widths.items())
            name = f"after growth {number}" if number else "before"
            counts.append((name, f"{subject.model.parameters(widths):,}", f"{subject.model.active(widths):,}", text))
        return (
            f"{subject.name}: {_si(round(subject.tokens))} tokens{steps}; {setting.ranks} ranks, ZeRO {setting.stage}"
            f"{shared}, {subject.dtype}, {setting.states} fp32 state tensors per parameter{offload}\n\n"
            f"parameters\n{_table(counts, left=(0, 3))}"
        )

    def _compute(self) -> str:
        """Eq. 29 over the growth step."""
        wide = 6.0 * self.recipe.active[-1] * self.subject.tokens
        rows: list[tuple[str, ...]] = [("tokens", "step", "FLOPs", "saved")]
        rows.append(("0%", self._at(0.0), f"{wide:.3e}", "0.0%"))
        rows += [self._compute_row(recipe) for recipe in self.sweep]
        narrow = 6.0 * self.recipe.active[0] * self.subject.tokens
        rows.append(("100%", self._at(1.0), f"{narrow:.3e}", "never grown"))
        return (
            "training compute (Eq. 29) and the share of it saved, by the part of the tokens seen before one growth\n"
            f"{_table(rows)}"
        )

    def _compute_row(self, recipe: Recipe) -> tuple[str, ...]:
        (share,) = recipe.shares
        return recipe.name, self._at(share), f"{recipe.flops(self.subject.tokens):.3e}", f"{recipe.saved:.1%}"

    def _recipes(self) -> str:
        rows = [("recipe", "grown after", "active parameters", "FLOPs", "saved", "as one growth after")]
        for recipe in (self.recipe, *self.others):
            rows.append(
                (
                    recipe.name,
                    ", ".join(f"{share:.1%}" for share in recipe.shares),
                    " -> ".join(_si(active) for active in recipe.active),
                    f"{recipe.flops(self.subject.tokens):.3e}",
                    f"{recipe.saved:.1%}",
                    f"{equal_share(recipe):.1%}",
                )
            )
        return f"recipes compared, parts of the tokens\n{_table(rows, left=(0, 1, 2))}"

    def _growth(self, number: int, found: Cost) -> str:
        growth = self.subject.growths[number - 1]
        step = self._step(growth.share)
        when = f"{growth.share:.1%} of the tokens" + ("" if step is None else f", step {step:,}")
        sent, pause = found.traffic, found.pause
        lines = [
            f"growth {number} after {when}: {growth}",
            "memory per rank [GiB]",
            _memory_table(found),
        ]
        if found.built:
            lines.append(
                f"and {_gib(found.built)} GiB of host memory per rank for the model as built, all experts in fp32"
            )
        parts = [f"{_gb(sent.moved)} state to grow", f"{_gb(sent.start)} broadcast by the engine's start"]
        if sent.refreshed:
            parts.append(f"{_gb(sent.refreshed)} refreshed weights")
        lines.append(f"bytes received per rank  {_gb(sent.received)} GB: {', '.join(parts)}")
        stops = [f"{pause.engine_start:.1f} s engine start", f"{pause.move:.1f} s moving state"]
        if sent.checkpoint:
            lines.append(f"checkpoint before it     {_gb(sent.checkpoint)} GB per rank")
            stops.append(f"{pause.checkpoint:.1f} s checkpoint")
        lines.append(f"expected pause           {pause.total:.1f} s: {', '.join(stops)}")
        return "\n".join(lines)

    def _assumptions(self) -> str:
        assumed = self.assumed
        return (
            f"assumed, not measured: each rank receives {assumed.bandwidth:g} GB/s (--bandwidth) and writes "
            f"{assumed.write_bandwidth:g} GB/s (--write-bandwidth);\nDeepSpeed constructs an engine in "
            f"{assumed.engine_start:g} s besides its broadcast (--engine-start); nothing overlaps; copies within a "
            "rank are\nfree. Not counted in memory: activations, communication buckets, weights that ZeRO-3 gathers in "
            "passing, the fp32\ngradients of an optimizer step, what allocators waste."
        )

    def _step(self, share: float) -> int | None:
        return None if self.subject.steps is None else round(share * self.subject.steps)

    def _at(self, share: float) -> str:
        step = self._step(share)
        return "-" if step is None else f"{step:,}"


def _cost_dict(found: Cost) -> dict[str, Any]:
    memory = {
        when: {
            place: {**asdict(getattr(footprint, place)), "total": getattr(footprint, place).total}
            for place in ("device", "host")
        }
        for when, footprint in (("before", found.before), ("during", found.during), ("after", found.after))
    }
    return {
        "memory": {**memory, "built_on_host": found.built},
        "bytes": {**asdict(found.traffic), "received": found.traffic.received},
        "pause": {**asdict(found.pause), "total": found.pause.total},
    }


def _memory_table(found: Cost) -> str:
    """One row per kind of memory that is used at all, device and host apart."""
    moments = (found.before, found.during, found.after)
    rows: list[tuple[str, ...]] = [("", "before", "during", "after")]
    for place in ("device", "host"):
        memories = [_of(moment, place) for moment in moments]
        if not any(memory.total for memory in memories):
            continue
        for entry in fields(Memory):
            values = [getattr(memory, entry.name) for memory in memories]
            if any(values):
                rows.append((f"{place} {entry.name}", *map(_gib, values)))
        rows.append((f"{place} total", *(_gib(memory.total) for memory in memories)))
    return _table(rows, left=(0,))


def _of(footprint: Footprint, place: str) -> Memory:
    return footprint.device if place == "device" else footprint.host


def _table(rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = ()) -> str:
    return "\n".join(text_table(rows, left=left, indent="  "))


def _si(count: int) -> str:
    """A number of parameters in three digits: 450M, 1.50B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{max(2 - len(str(int(value))) + 1, 0)}f}{unit}"
    return str(count)


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"
