"""A growing run holds what an engine needs to know to grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.engine.gradients import GradientWatch
from ds_sparkling.errors import GrowthError
from ds_sparkling.growth import GrowthPlan
from ds_sparkling.monitoring.observations import Observations
from ds_sparkling.spec.config import GrowthConfig, SparklingConfig
from ds_sparkling.spec.record import GrowthRecord, Spent


@dataclass
class ClientState:
    """The state of the training script itself that its checkpoints carry, as far as a run has seen it.

    Attributes:
        contents: what was last passed to ``save_checkpoint`` or for a growth, or came out of ``load_checkpoint``.
        step: optimizer steps done then.
    """

    contents: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    def see(self, contents: Mapping[str, Any] | None, step: int) -> None:
        """Remember ``contents``, if there are any."""
        if contents and contents is not self.contents:
            self.contents, self.step = dict(contents), step


@dataclass(frozen=True, kw_only=True)
class GrowingRun:
    """A training run that grows; it hangs on the engine as ``engine.sparkling``.

    Attributes:
        build_model: makes the model from the axis widths.
        ds_config: the DeepSpeed config, ``"sparkling"`` block included.
        config: that block, parsed.
        arguments: further arguments of ``deepspeed.initialize``.
        record: the growths so far.
        checkpoint_dir: where to save before a growth; None if nowhere.
        plans: the growths since the first engine was made, whichever way it was; the last one made this engine.
        parameters: total and active (per token) parameters of this engine's model.
        monitored: whether the first rank, which writes for all, has a monitor.
        observations: what diagnostics remember; the same object in every engine of the run.
        client: the training script's own state; the same object in every engine of the run.
        gradients: knows whether the engine holds gradients; None until the run hangs on one.
        on_growth: for an engine in other hands: it grows in place, and this is called with it after each growth.
        inputs: to try growths with; None for those that ``config`` names, or random token ids.
    """

    build_model: BuildModel
    ds_config: dict[str, Any]
    config: SparklingConfig
    arguments: dict[str, Any]
    record: GrowthRecord
    checkpoint_dir: str | None
    plans: tuple[GrowthPlan, ...] = ()
    parameters: tuple[int, int] = (0, 0)
    monitored: bool = False
    observations: Observations = field(default_factory=Observations, compare=False)
    on_growth: Callable[[DeepSpeedEngine], None] | None = None
    client: ClientState = field(default_factory=ClientState, compare=False)
    gradients: GradientWatch | None = field(default=None, compare=False)
    inputs: Inputs | None = field(default=None, compare=False)

    @property
    def plan(self) -> GrowthPlan | None:
        """The growth that made this engine; None for the first one."""
        return self.plans[-1] if self.plans else None

    @property
    def widths(self) -> dict[str, int]:
        """The widths in force."""
        return self.record.widths

    @property
    def spent(self) -> Spent | None:
        """Tokens and training compute so far; None after a checkpoint that doesn't tell, until the next step."""
        return self.observations.spent

    def due(self, step: int) -> GrowthConfig | None:
        """The first planned growth that is due when ``step`` optimizer steps are done and hasn't happened."""
        happened = {growth.planned_step for growth in self.record.growths}
        for growth in self.config.growths:
            if growth.at_step <= step and growth.at_step not in happened:
                return growth
        return None


def run_of(engine: DeepSpeedEngine) -> GrowingRun:
    """The engine's :class:`GrowingRun`; GrowthError if it has none."""
    run = getattr(engine, "sparkling", None)
    if not isinstance(run, GrowingRun):
        raise GrowthError(
            "this engine can't grow: make it by ds_sparkling.initialize, or pass it to ds_sparkling.adopt"
        )
    return run


def gradients_of(engine: DeepSpeedEngine) -> GradientWatch:
    """What knows whether ``engine``, which can grow, holds gradients."""
    watch = run_of(engine).gradients
    assert watch is not None
    return watch
