"""One process trains one run, and widens it by the functions that the engine uses: plan, Widener, births, scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from ds_sparkling.discovery.find_axes import find_axes
from ds_sparkling.files import whole_file
from ds_sparkling.growth import Block, GrowthPlan, GrowthTables, Widener, birth_blocks, make_plan
from ds_sparkling.models.olmoe import DecoderLayer, OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.models.text import Corpus
from ds_sparkling.monitoring.twin_distance import twin_cosine
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.optim.weight_norm import NormRatios, Part, Parts
from ds_sparkling.spec.axes import ParamAxes
from ds_sparkling.spec.strategy import Init, OptimizerState, Strategy
from experiments.muon import orthogonalise
from experiments.runs import FINAL_RATIO, HIDDEN, INNER, Outcome, Point, Shape, TrainingRun

WEIGHT_DECAY, BETA1, CLIP = 0.1, 0.9, 1.0
#: Bytes.
VOCABULARY = 256
#: Points on a run's validation curve.
CURVE_POINTS = 20
#: Steps after a growth at which the validation loss is looked at besides, to see a shock.
SHOCK_STEPS = (5, 10, 20, 40)


@lru_cache(maxsize=2)
def corpus_of(data: str) -> Corpus:
    """The corpus of a run; the standard library's sources if none is named."""
    return Corpus.from_path(Path(data)) if data else Corpus.standard_library()


def model_config(shape: Shape, widths: Mapping[str, int]) -> OlmoeConfig:
    """The model of a run; byte-level."""
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=widths[HIDDEN],
        moe_intermediate_size=widths[INNER],
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )


@lru_cache(maxsize=32)
def axes_of(
    shape: Shape, widths: tuple[tuple[str, int], ...], growths: tuple[tuple[str, ...], ...]
) -> dict[str, ParamAxes]:
    """What the dimensions of the model are, found as for an engine."""
    found = find_axes(lambda **w: OlmoeForCausalLM(model_config(shape, w)), dict(widths), growths)
    return found.axes


def active_parameters(shape: Shape, widths: Mapping[str, int]) -> int:
    """Parameters that one token uses (Eq. 29's N)."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(model_config(shape, widths))
    total = sum(param.numel() for param in model.parameters())
    experts = sum(param.numel() for name, param in model.named_parameters() if ".experts." in name)
    return total - round(experts * (1 - shape.top_k / shape.experts))


class Trainer:
    """A model, its optimizers and its schedule, as they stand after ``step`` steps of a run."""

    def __init__(self, run: TrainingRun, device: torch.device) -> None:
        self.run = run
        self.device = device
        self.step = 0
        self.widths = dict(run.widths)
        self.history: dict[str, tuple[int, ...]] = {axis: (width,) for axis, width in run.widths}
        self.axes = axes_of(run.shape, run.widths, tuple(tuple(sorted(dict(s.widths))) for s in run.stages))
        torch.manual_seed(run.seed)
        self.model = self._model()
        self.flops = 0.0
        self.seconds = 0.0
        self.growths = 0
        self.strategy: Strategy | None = None
        self._set_up([])

    def _model(self) -> OlmoeForCausalLM:
        return OlmoeForCausalLM(model_config(self.run.shape, self.widths)).to(self.device)

    def _set_up(self, schedulers: list[dict[str, Any]]) -> None:
        """Optimizers, schedulers and per-birth steps around the present model."""
        self.optimizers = self._make_optimizers()
        self.schedulers = [RewarmupScheduler(self._schedule(optimizer), optimizer) for optimizer in self.optimizers]
        for scheduler, state in zip(self.schedulers, schedulers, strict=False):
            scheduler.load_state_dict(state)
        self.active = active_parameters(self.run.shape, self.widths)
        self.steps = [
            BirthStep(
                optimizer,
                scheduler,
                dict.fromkeys(optimizer.param_groups[0]["params"], 0),
                self._blocks,
                NormRatios(self._parts),
            )
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True)
        ]

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        run, params = self.run, dict(self.model.named_parameters())
        muon = [name for name in params if run.optimizer == "muon" and _is_matrix(name, params[name])]
        adamw = torch.optim.AdamW(
            [param for name, param in params.items() if name not in muon],
            lr=run.lr,
            betas=(BETA1, run.beta2),
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        if not muon:
            return [adamw]
        # Coupled and decoupled weight decay are the same without a momentum of its own.
        return [adamw, torch.optim.SGD([params[name] for name in muon], lr=run.muon_lr, weight_decay=WEIGHT_DECAY)]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> SequentialLR:
        steps, warmup, peak = self.run.steps, self.run.warmup, optimizer.param_groups[0]["lr"]
        return SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, 1 / warmup, 1.0, warmup),
                CosineAnnealingLR(optimizer, steps - warmup, eta_min=FINAL_RATIO * peak),
            ],
            [warmup],
        )

    def _blocks(self) -> dict[Tensor, list[Block]]:
        return {
            param: birth_blocks(self.axes[name], tuple(param.shape), self.history, 0, param.numel())
            for name, param in self.model.named_parameters()
        }

    def _parts(self) -> Parts:
        blocks = self._blocks()
        return len(blocks), {param: [Part(number, tuple(b))] for number, (param, b) in enumerate(blocks.items())}

    # -- training ----------------------------------------------------------------------------------------------

    def train_step(self) -> Tensor:
        """One optimizer step; returns the training loss."""
        shape = self.run.shape
        started = self._now()
        batch = corpus_of(self.run.data).batch(
            self.step, size=shape.batch, length=shape.length, seed=self.run.seed, rank=0, ranks=1
        )
        loss: Tensor = self.model(**_on(batch, self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        if len(self.optimizers) > 1:
            orthogonalise(self.optimizers[1])
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        self.step += 1
        self.flops += 6.0 * self.active * shape.tokens
        self.seconds += self._now() - started
        return loss.detach()

    def _now(self) -> float:
        """Seconds; the processor's own, which go on only while this run is worked on, but on a GPU."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def grow(self, widths: Mapping[str, int], strategy: Strategy) -> GrowthPlan:
        """Widen model and optimizer states, as an engine's growth does."""
        old = {name: param.detach() for name, param in self.model.named_parameters()}
        states = {
            name: next(o.state[param] for o in self.optimizers if param in o.state)
            for name, param in self.model.named_parameters()
        }
        self.growths += 1
        shapes = {name: tuple(weight.shape) for name, weight in old.items()}
        plan = make_plan(shapes, self.axes, self.widths, widths, strategy, number=self.growths)
        self.widths.update(widths)
        self.history = {axis: (*sizes, self.widths[axis]) for axis, sizes in self.history.items()}
        self.strategy = strategy
        schedulers = [scheduler.state_dict() for scheduler in self.schedulers]
        rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.model = self._model()
        self._set_up(schedulers)
        for optimizer, scheduler, rate in zip(self.optimizers, self.schedulers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            scheduler.born(strategy)
        tables = GrowthTables(plan)
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                widener = Widener(plan, name, tables=tables)
                widener.weight(old[name], param.data.view(-1))
                if strategy.optimizer_state is not OptimizerState.DROP:
                    optimizer = next(o for o in self.optimizers if any(p is param for p in o.param_groups[0]["params"]))
                    optimizer.state[param] = _widened_state(widener, states[name], param)
        return plan

    # -- measuring ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, windows: int) -> float:
        """Mean validation loss over evenly spread windows, nats per token."""
        shape = self.run.shape
        size = min(32, windows)
        batches = corpus_of(self.run.data).validation_batches(
            size=size, length=shape.length, batches=-(-windows // size), rank=0, ranks=1
        )
        self.model.eval()
        losses = [self.model(**_on(batch, self.device)) for batch in batches]
        self.model.train()
        return float(torch.stack(losses).double().mean())

    def twins(self) -> float | None:
        """Mean cosine of the units that the latest growth copied and their sources, over rows that produce them."""
        if self.strategy is None or self.strategy.fan_out is not Init.COPY:
            return None
        before = {axis: sizes[-2] for axis, sizes in self.history.items()}
        grown = [axis for axis, width in self.widths.items() if width != before[axis]]
        cosines = [
            twin_cosine(param.detach(), self.axes[name], axis, before, self.widths)
            for name, param in self.model.named_parameters()
            for axis in grown
        ]
        return float(torch.cat(cosines).mean())

    @torch.no_grad()
    def block_ratios(self) -> list[float]:
        """RMS(out)/RMS(in) of every attention and MoE block on the first validation windows."""
        ratios: list[float] = []

        def measure(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            ratios.append(float(out.square().mean().sqrt() / args[0].square().mean().sqrt()))

        layers = [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        blocks = [block for layer in layers for block in (layer.self_attn, layer.mlp)]
        hooks = [block.register_forward_hook(measure) for block in blocks]
        self.validate(16)
        for hook in hooks:
            hook.remove()
        return ratios

    # -- snapshots ---------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the state of a run that hasn't grown, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "step": self.step,
            "flops": self.flops,
            "seconds": self.seconds,
        }
        with whole_file(path) as part:
            torch.save(state, part)

    def load(self, path: Path) -> None:
        """Take up the state that :meth:`save` wrote."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        self.step, self.flops, self.seconds = saved["step"], saved["flops"], saved["seconds"]


@dataclass
class _Progress:
    """What a run has shown so far."""

    curve: list[Point]
    before: float | None = None
    after: float | None = None
    drift: float | None = None


def train(
    run: TrainingRun,
    snapshots: Path,
    keep: tuple[int, ...] = (),
    until: int | None = None,
    report: Callable[[], None] = lambda: None,
) -> Outcome | None:
    """Train a run to its end.

    Args:
        run: the run.
        snapshots: where trunks are kept; a run that grows starts from its trunk's, if it is there.
        keep: the steps at which this one is to be kept for others.
        until: the step to stop at, without an outcome; None for the end.
        report: called after each step.

    Returns:
        What it came to; a run that diverged has an infinite loss. None if it was to stop before its end.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(run, device)
    started = snapshots / f"{run.trunk.key}-{run.first_growth}.pt"
    if run.stages and started.exists():
        trainer.load(started)
    config = run.config
    stages = {stage.at_step: stage for stage in config.growths}
    every = max(1, run.steps // CURVE_POINTS)
    progress = _Progress([])
    looks: set[int] = set()
    for step in range(trainer.step, run.steps):
        if step in keep:
            trainer.save(snapshots / f"{run.key}-{step}.pt")
        if step == until:
            return None
        if step in stages:
            _grow(trainer, stages[step].widths, config.strategy, progress)
            looks = {step + after for after in SHOCK_STEPS}
        trainer.train_step()
        if trainer.step % every == 0 or trainer.step in looks:
            _point(trainer, progress, trainer.validate(run.shape.curve_windows))
        report()
    final = trainer.validate(run.shape.windows)
    return Outcome(
        loss=final if math.isfinite(final) else math.inf,
        flops=trainer.flops,
        seconds=trainer.seconds,
        before=progress.before,
        after=progress.after,
        twins=trainer.twins(),
        drift=progress.drift,
        curve=tuple(progress.curve),
    )


def _grow(trainer: Trainer, widths: Mapping[str, int], strategy: Strategy, progress: _Progress) -> None:
    windows = trainer.run.shape.curve_windows
    ratios = trainer.block_ratios()
    progress.before = trainer.validate(windows)
    _point(trainer, progress, progress.before)
    trainer.grow(widths, strategy)
    progress.after = trainer.validate(windows)
    _point(trainer, progress, progress.after)
    changes = [math.log(new / old) for new, old in zip(trainer.block_ratios(), ratios, strict=True)]
    progress.drift = math.exp(sum(changes) / len(changes))


def _point(trainer: Trainer, progress: _Progress, loss: float) -> None:
    progress.curve.append(Point(trainer.step, trainer.flops, loss, trainer.twins()))


def _widened_state(widener: Widener, old: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """One parameter's optimizer state after a growth: per-element state widened, numbers as they were."""
    state: dict[str, Any] = {}
    for key, value in old.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = torch.empty_like(param)
            widener.state(key, value, state[key].view(-1))
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else value
    return state


def _is_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon is for it: matrices inside the layers but the router's."""
    return param.dim() > 1 and name.startswith("layers.") and not name.endswith("gate.weight")


def _on(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
