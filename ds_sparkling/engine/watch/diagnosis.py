"""The diagnosis of a running engine: every ``diagnose_every`` steps, and around each growth.

What is measured in the forward pass is measured by hooks that are on only while the training forward passes of such a
step run. What has to be added up over ranks is added up after the step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from ds_sparkling.engine.growing_run import run_of
from ds_sparkling.engine.hooks import BACKWARD, until_unhooked
from ds_sparkling.engine.optimizers import adapter_of
from ds_sparkling.engine.watch.effective_rank import RankProbe
from ds_sparkling.engine.watch.step_callbacks import ForwardHook, MonitorEvent
from ds_sparkling.engine.watch.tensorboard import write_by_compute, writer_of
from ds_sparkling.engine.watch.twins import TwinProbe
from ds_sparkling.monitoring.activations import ActivationMeter, root_mean_squares
from ds_sparkling.monitoring.blocks import repeated_blocks, router_map, routers
from ds_sparkling.monitoring.expert_load import Router, RoutingMeter
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.spec.active_experts import chosen_experts
from ds_sparkling.spec.autoep import BlockNames

logger = logging.getLogger(__name__)

#: Losses that are kept before they are looked at: reading one waits for the device.
_LOSSES = 10

#: As DeepSpeed's documentation calls it; only its pipeline engine writes it by itself.
LOSS = "Train/Samples/train_loss"


class Diagnosis:
    """Observes one engine's steps. Without a monitor it only looks at the loss.

    Args:
        engine: fitted out; its module must not change.
        step: its optimizer step, in which the gradients are seen.
    """

    def __init__(self, engine: DeepSpeedEngine, step: BirthStep) -> None:
        self._engine = engine
        self._step = step
        self._losses = LossWatch(engine)
        self._due = False
        self._twins: tuple[int, TwinProbe] | None = None
        self._ranks: RankProbe | None = None
        self._activations = ActivationMeter(repeated_blocks(engine.module))
        self._routing = RoutingMeter(_routers(engine))
        before = engine.module.register_forward_pre_hook(ForwardHook(self._before_forward))
        after = engine.module.register_forward_hook(ForwardHook(self._after_forward), always_call=True)
        until_unhooked(engine, before.remove)
        until_unhooked(engine, after.remove)

    def due(self, step: int) -> bool:
        """Whether the optimizer step that makes it ``step`` steps in all is diagnosed: every so many steps, and the
        last one before a planned growth and the first one after any."""
        run = run_of(self._engine)
        every = run.config.diagnose_every
        if not every or not run.monitored:
            return False
        before = any(growth.at_step == step for growth in run.config.growths) and run.due(step) is not None
        after = bool(run.record.growths) and run.record.growths[-1].step == step - 1
        return step % every == 0 or before or after

    def before_step(self) -> None:
        self._due = self.due(self._engine.global_steps + 1)
        self._step.watch = None
        if self._due:
            twins = self._twin_probe()
            if not twins.empty:
                self._step.watch = twins.keep_gradients

    def after_step(self) -> None:
        self._step.watch = None
        self._losses.after_step()
        if not self._due:
            return
        with torch.no_grad():
            events = [*self._in_forward(), *self._of_twins(), *self._of_ranks()]
        self._engine.monitor.write_events(events)

    # -- in the forward pass ------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, _args: Any) -> None:
        if module.training and torch.is_grad_enabled() and self.due(self._engine.global_steps + 1):
            self._activations.on()
            self._routing.on()

    def _after_forward(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._activations.off()
        self._routing.off()

    def _in_forward(self) -> list[MonitorEvent]:
        """RMS and routing of the step's forward passes on all ranks, added up by one collective."""
        device, samples = self._engine.device, self._engine.global_samples
        activations, routing = self._activations.take(device), self._routing.take(device)
        sums = torch.cat([activations.flatten(), routing])
        dist.all_reduce(sums)
        observations, writer = run_of(self._engine).observations, writer_of(self._engine)
        events: list[MonitorEvent] = []
        measured = root_mean_squares(sums[: activations.numel()].view_as(activations))
        for block, rms in zip(self._activations.names, measured, strict=True):
            if rms is None:
                continue
            events.append((f"activation_rms/{block}", rms[1], samples))
            if rms[0] > 0:
                ratio = observations.ratios[block] = rms[1] / rms[0]
                events.append((f"activation_ratio/{block}", ratio, samples))
                before = observations.ratios_before.get(block, 0.0)
                if before > 0:
                    events.append((f"activation_drift/{block}", ratio / before, samples))
        for block, routed in self._routing.read(sums[activations.numel() :]).items():
            if routed.entropy is not None:
                events.append((f"router/entropy/{block}", routed.entropy, samples))
            if routed.counts.sum() > 0:
                events.append((f"router/load_max/{block}", float(routed.load.max()), samples))
                events.append((f"router/load_min/{block}", float(routed.load.min()), samples))
                if writer is not None:
                    _write_loads(writer, f"router/load/{block}", routed.load.tolist(), samples)
                self._warn(observations.experts.see(self._engine.global_steps, block, routed.counts.tolist()))
        return events

    # -- after the step -----------------------------------------------------------------------------------------

    def _of_twins(self) -> list[MonitorEvent]:
        twins, run, samples = self._twin_probe(), run_of(self._engine), self._engine.global_samples
        if twins.empty:
            return []
        weights, gradients = twins.measure()
        events: list[MonitorEvent] = []
        if weights is not None:
            events += [("twins/cosine", weights.mean, samples), ("twins/cosine_max", weights.largest, samples)]
            birth = self._engine.lr_scheduler.births[-1]
            growth = len(run.record.growths)
            self._warn(run.observations.twins.see(growth, birth.age, birth.rewarmup.steps, weights.by_parameter))
            writer = writer_of(self._engine)
            if writer is not None and weights.own.numel():
                writer.add_histogram("twins/cosines", weights.own, samples)
        if gradients is not None:
            events.append(("twins/gradient_cosine", gradients.mean, samples))
        return events

    def _of_ranks(self) -> list[MonitorEvent]:
        if self._ranks is None:
            self._ranks = RankProbe(self._engine)
        return [
            (f"effective_rank/{name}", rank, self._engine.global_samples)
            for name, rank in self._ranks.measure().items()
        ]

    def _twin_probe(self) -> TwinProbe:
        """Made anew when the growth record has changed, as it does when a checkpoint is loaded."""
        growths = len(run_of(self._engine).record.growths)
        if self._twins is None or self._twins[0] != growths:
            self._twins = growths, TwinProbe(self._engine)
        return self._twins[1]

    def _warn(self, message: str | None) -> None:
        if message is not None and self._engine.global_rank == 0:
            logger.warning("%s", message)


class LossWatch:
    """Keeps the first rank's losses as they are passed to ``engine.backward``, and looks at them a few at a time; every
    ``log_every`` steps it writes the latest.

    A loss that is put through its own ``backward`` isn't seen.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._micro: list[Tensor] = []
        if engine.global_rank != 0:
            return
        plain_backward = engine.backward

        def backward(loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any) -> Any:
            config = run_of(engine).config
            if isinstance(loss, Tensor) and loss.numel() == 1 and (config.diagnose_every or config.log_every):
                # What the Trainer passes is its micro step's share of the loss already.
                parts = engine.gradient_accumulation_steps() if scale_wrt_gas else 1
                self._micro.append(loss.detach().float().reshape(()) / parts)
            return plain_backward(loss, retain_graph, scale_wrt_gas, **kwargs)

        BACKWARD.install(engine, backward)

    def after_step(self) -> None:
        engine, run = self._engine, run_of(self._engine)
        observations, every = run.observations, run.config.log_every
        if self._micro:
            loss, step = torch.stack(self._micro).sum(), engine.global_steps
            self._micro = []
            if run.config.diagnose_every:
                observations.unseen_losses.append((step, loss))
            if every and step % every == 0 and run.monitored:
                engine.monitor.write_events([(LOSS, float(loss), engine.global_samples)])
                write_by_compute(engine, "train_loss", float(loss))
        if len(observations.unseen_losses) >= _LOSSES:
            observations.look_at_losses()


def _write_loads(writer: Any, tag: str, loads: Sequence[float], samples: int) -> None:
    """A histogram with a bar for each expert, as high as its load."""
    experts = range(len(loads))
    writer.add_histogram_raw(
        tag,
        min=0.0,
        max=float(len(loads)),
        num=sum(loads),
        sum=sum(expert * load for expert, load in zip(experts, loads, strict=True)),
        sum_squares=sum(expert**2 * load for expert, load in zip(experts, loads, strict=True)),
        bucket_limits=[expert + 1.0 for expert in experts],
        bucket_counts=list(loads),
        global_step=samples,
    )


def _routers(engine: DeepSpeedEngine) -> dict[str, Router]:
    """The routers of the engine's module and how many experts they choose from and for a token."""
    found, adapter = {}, adapter_of(engine)
    for name, module in routers(engine.module, BlockNames.from_config(engine.config)).items():
        linear = router_map(module)
        assert linear is not None
        experts = adapter.full_shape(_weight(linear))[0]
        top_k = getattr(module, "top_k", None)
        top_k = top_k if isinstance(top_k, int) else chosen_experts(engine.module)
        found[name] = Router(module, experts, top_k, _scoring(module, engine.module))
    return found


def _scoring(router: nn.Module, model: nn.Module) -> str:
    """What makes probabilities of a router's logits, as far as it or the model's config tells."""
    told = (getattr(router, "score_func", None), getattr(getattr(model, "config", None), "scoring_func", None))
    return "sigmoid" if "sigmoid" in told else "softmax"


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
