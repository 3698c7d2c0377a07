"""From one engine to the next: at other widths, which is a growth, or at the same, which is a rebuild.

Everything that can be known about it, and refused, is known before the old engine is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.discovery.build import check_wide
from ds_sparkling.engine import access
from ds_sparkling.engine.carry_over import Carried
from ds_sparkling.engine.checkpoint_before import save_before
from ds_sparkling.engine.fail_together import FailTogether
from ds_sparkling.engine.growing_run import GrowingRun, gradients_of, run_of
from ds_sparkling.engine.hugging_face_build import built_plainly
from ds_sparkling.engine.in_place import Held
from ds_sparkling.engine.logical_names import held_parameters
from ds_sparkling.engine.notices import notice_growth
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.planning import agreed, check_same_model, knowing, plan_growth
from ds_sparkling.engine.shard import Shard
from ds_sparkling.engine.stepping import check_optimizer
from ds_sparkling.engine.watch.growth_curves import mark_growth
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.spec.unsupported import zero_stage


class Rebuild:
    """The engine is made anew at the same widths, and goes on bit for bit as if nothing had happened.

    Attributes:
        widths: the axes that grow, and to what.
        doing: what is being done, for errors; the same on all ranks.
    """

    widths: Mapping[str, int] = {}
    doing = "rebuilding the engine"

    @property
    def growths(self) -> list[Mapping[str, int]]:
        """The growths to try out beforehand."""
        return []

    def check(self, engine: DeepSpeedEngine, run: GrowingRun) -> None:
        """Refuse what can't be done to ``engine``, which is as it was."""

    def recorded(self, run: GrowingRun, plan: GrowthPlan, step: int) -> GrowingRun:
        """The run as it is afterwards, when ``step`` optimizer steps are done."""
        return run

    def announce(self, engine: DeepSpeedEngine, transition: Transition) -> None:
        """Save and tell what is about to happen. Collective."""

    def mark(self, grown: DeepSpeedEngine, transition: Transition) -> None:
        """Have the new engine, which holds everything, know what has happened."""


class Growth(Rebuild):
    """The engine becomes wider.

    Args:
        widths: the axes that grow, and to what.
        planned_step: the step that the config plans it for; None if it isn't planned.
        client_state: what goes into the checkpoint before it.
    """

    def __init__(
        self, widths: Mapping[str, int], *, planned_step: int | None, client_state: Mapping[str, Any] | None
    ) -> None:
        self.widths = dict(widths)
        self.doing = f"growing to {dict(sorted(widths.items()))}"
        self._planned_step = planned_step
        self._client_state = client_state
        self._in_words = ""

    @property
    def growths(self) -> list[Mapping[str, int]]:
        return [self.widths]

    def check(self, engine: DeepSpeedEngine, run: GrowingRun) -> None:
        check_optimizer(engine, run.config.strategy)
        engine.lr_scheduler.check(run.config.strategy)

    def recorded(self, run: GrowingRun, plan: GrowthPlan, step: int) -> GrowingRun:
        record = run.record.after(
            plan.grown_widths, plan.strategy, step=step, planned_step=self._planned_step, layers=plan.layers
        )
        return replace(run, record=record, plans=(*run.plans, plan))

    def announce(self, engine: DeepSpeedEngine, transition: Transition) -> None:
        run, plan = transition.run, transition.plan
        transition.checkpoint = save_before(engine, run, plan.number, self._client_state)
        if engine.global_rank == 0:
            self._in_words = notice_growth(run, plan, engine.global_steps)

    def mark(self, grown: DeepSpeedEngine, transition: Transition) -> None:
        grown.lr_scheduler.born(transition.plan.strategy)
        transition.run.observations.grown()
        mark_growth(grown, self._in_words)


@dataclass(kw_only=True)
class Transition:
    """A growth or a rebuild on its way from the old engine to the new one.

    Attributes:
        change: which of the two.
        run: as it is when it is done.
        plan: what becomes of every parameter.
        old: this rank's shards of the old engine; emptied while they are moved.
        carried: everything else that goes on.
        group: the process group that stage 3 partitions parameters over.
        held: what others may hold of the old engine.
        compiled: whether the old engine was.
        checkpoint: the one written before; None if there is none.
    """

    change: Rebuild
    run: GrowingRun
    plan: GrowthPlan
    old: dict[str, Shard]
    carried: Carried
    group: Any
    held: Held
    compiled: bool
    checkpoint: Path | None = None

    @property
    def way_out(self) -> str:
        if self.checkpoint is None:
            return "the engine is lost; resume from the last checkpoint, in new processes"
        return f"the engine is lost, its state just before is in {self.checkpoint}; resume from there, in new processes"


def prepared(engine: DeepSpeedEngine, change: Rebuild) -> Transition:
    """Everything about a change that can be known, and refused, while ``engine`` is as it was. Collective."""
    run = run_of(engine)
    all_ranks = FailTogether(change.doing, patience=run.config.patience)
    with all_ranks:
        gradients_of(engine).refuse_held()
    all_ranks.settle()
    all_ranks = FailTogether("planning the growth")
    record = agreed(partial(knowing, run.record, change.growths, run.build_model, run.config, run.inputs), all_ranks)
    run = replace(run, record=record)
    partitioned = zero_stage(run.ds_config) == 3
    check_same_model(run.build_model, {**run.widths, **change.widths}, all_ranks, partitioned=partitioned)
    with all_ranks, built_plainly():
        plan = plan_growth(engine, run, change.widths)
        check_wide(run.build_model, record.axes, run.widths, change.widths, plan.layers)
        change.check(engine, run)
        experts = {name for name, held in held_parameters(engine).items() if held.experts}
        transition = Transition(
            change=change,
            run=change.recorded(run, plan, engine.global_steps),
            plan=plan,
            group=adapter_of(engine).partition_group(experts),
            old=access.shards(engine),
            carried=Carried(engine),
            held=Held(engine),
            compiled=bool(engine.is_compiled),
        )
    all_ranks.settle()
    return transition
