"""The main job: train a mixture-of-experts language model, widen it mid-way, go on.

Its command line is :mod:`ds_sparkling.train`. One JSON file says the rest: DeepSpeed's own keys, the ``"sparkling"``
block, and two blocks of this job, ``"model"`` (:class:`~ds_sparkling.models.olmoe.OlmoeConfig`) and ``"training"``
(:class:`TrainingConfig`).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import ds_sparkling
from ds_sparkling.engine.extension_locks import warn_of_left_locks
from ds_sparkling.engine.fail_together import FailTogether, of_first_rank
from ds_sparkling.engine.start import meet
from ds_sparkling.engine.watch.tensorboard import write_by_compute
from ds_sparkling.engine.watch.token_meter import spent_events
from ds_sparkling.errors import CheckpointError, SparklingError
from ds_sparkling.job.loss_picture import draw_losses
from ds_sparkling.job.variant_config import as_variant
from ds_sparkling.job.variants import Variant
from ds_sparkling.models.olmoe import OlmoeConfig, olmoe_factory
from ds_sparkling.models.text import Corpus
from ds_sparkling.progress import progress_bar
from ds_sparkling.spec.checked import Checked, Integer, checked
from ds_sparkling.spec.config import read_json
from ds_sparkling.spec.record import Spent
from ds_sparkling.spec.run_summary import RunSummary


@checked(kw_only=True)
class TrainingConfig(Checked):
    """The ``"training"`` block."""

    steps: Integer = Field(ge=1, description="Optimizer steps in all.")
    sequence_length: Integer = Field(ge=1, description="Tokens per sequence.")
    seed: Integer = Field(default=0, ge=0, description="Seed of the weights and the data order.")
    evaluate_every: Integer = Field(default=100, ge=1, description="Optimizer steps between validations.")
    evaluate_batches: Integer = Field(
        default=8, ge=1, description="Validation batches, each of a micro step's size over all ranks."
    )
    save_every: Integer = Field(
        default=0, ge=0, description="Optimizer steps between checkpoints. 0 saves only before a growth and at the end."
    )
    log_every: Integer = Field(
        default=10, ge=1, description="Optimizer steps between points in TensorBoard and on the progress bar."
    )


@dataclass
class Progress:
    """What a run has seen so far; it travels in the checkpoint's client state.

    Attributes:
        seconds: time from the first step on, while it ran.
        milestones: (name, step, validation loss).
        validations: (tokens, FLOPs, validation loss) of all of them.
    """

    seconds: float = 0.0
    milestones: list[tuple[str, int, float]] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def client_state(self) -> dict[str, Any]:
        return {"progress": asdict(self)}


class Job:
    """A training run: the engine of the moment, its data and its progress."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        corpus: Corpus,
        training: TrainingConfig,
        checkpoints: Path,
        progress: Progress,
    ) -> None:
        self.engine = engine
        self.corpus = corpus
        self.training = training
        self.checkpoints = checkpoints
        self.progress = progress
        self.started = time.perf_counter() - progress.seconds
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.accumulation = engine.gradient_accumulation_steps()
        self.micro_batch = engine.train_batch_size() // self.accumulation

    def train(self) -> None:
        """Train to the end of the budget, growing on the way, and save."""
        if self.engine.global_steps < self.training.steps:  # a finished run that has been given more
            self.progress.milestones = [mark for mark in self.progress.milestones if mark[0] != "end"]
        started = self.engine.global_steps
        with progress_bar(
            total=self.training.steps, initial=started, shown=self.rank == 0, leave=True, unit="step"
        ) as bar:
            while (step := self.engine.global_steps) < self.training.steps:
                self._train_step(step, bar)
        if not any(name == "end" for name, *_ in self.progress.milestones):
            self.progress.milestones.append(("end", self.engine.global_steps, self.evaluate()))
            self._look_at_the_clock()
            self._save()

    def _train_step(self, step: int, bar: tqdm[Any]) -> None:
        """One step, and what is due before and after it."""
        if self.engine.sparkling.due(step):
            self._grow(step)
        loss = self._step(step)
        bar.update()
        done = step + 1
        if done % self.training.log_every == 0:
            mean = self._mean(loss)
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            self._log({"Train/loss": mean, "Train/grad_norm": float(self.engine.get_global_grad_norm() or 0.0)})
        if done < self.training.steps:
            if done % self.training.evaluate_every == 0:
                self.evaluate()
            if self.training.save_every and done % self.training.save_every == 0:
                self._save()

    def _step(self, step: int) -> Tensor:
        """One optimizer step; returns this rank's mean loss."""
        losses = []
        for micro_step in range(step * self.accumulation, (step + 1) * self.accumulation):
            batch = self.corpus.batch(
                micro_step,
                size=self.micro_batch,
                length=self.training.sequence_length,
                seed=self.training.seed,
                rank=self.rank,
                ranks=self.ranks,
            )
            loss = self.engine(**self._on_device(batch))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        self._look_at_the_clock()
        return torch.stack(losses).mean()

    def _look_at_the_clock(self) -> None:
        self.progress.seconds = time.perf_counter() - self.started

    def _grow(self, step: int) -> None:
        before = ("before growth", step)
        if before not in [(name, at) for name, at, _ in self.progress.milestones]:
            self.progress.milestones.append((*before, self.evaluate()))
        self.engine = ds_sparkling.grow_if_due(self.engine, client_state=self.progress.client_state)
        self.progress.milestones.append(("after growth", step, self.evaluate()))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Validation loss over all ranks; goes to the monitor too."""
        self.engine.eval()
        batches = self.corpus.validation_batches(
            size=self.micro_batch,
            length=self.training.sequence_length,
            batches=self.training.evaluate_batches,
            rank=self.rank,
            ranks=self.ranks,
        )
        losses = [self.engine(**self._on_device(batch)) for batch in batches]
        self.engine.train()
        loss = self._mean(torch.stack(losses).mean())
        self.progress.validations.append((self._spent.tokens, self._spent.flops, loss))
        self._log({"Validation/loss": loss})
        write_by_compute(self.engine, "validation_loss", loss)
        return loss

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tokens.to(self.engine.device) for name, tokens in batch.items()}

    def _mean(self, value: Tensor) -> float:
        """Mean of a scalar over all ranks."""
        total = value.float().clone()
        dist.all_reduce(total)
        return float(total) / self.ranks

    def _log(self, values: dict[str, float]) -> None:
        samples = self.engine.global_samples
        events = [(name, value, samples) for name, value in values.items()]
        self.engine.monitor.write_events([*events, *spent_events(self.engine)])

    def _save(self) -> None:
        self.engine.save_checkpoint(str(self.checkpoints), client_state=self.progress.client_state)

    def outcome(self, variant: Variant) -> RunSummary:
        """The finished run's figures."""
        total, active = self.engine.sparkling.parameters
        (loss,) = (loss for name, _, loss in self.progress.milestones if name == "end")
        spent, seconds = self._spent, self.progress.seconds
        return RunSummary(
            variant=variant.value,
            validation_loss=loss,
            steps=self.engine.global_steps,
            tokens=spent.tokens,
            flops=spent.flops,
            seconds=seconds,
            parameters=total,
            active_parameters=active,
            validations=self.progress.validations,
        )

    @property
    def _spent(self) -> Spent:
        spent: Spent | None = self.engine.sparkling.spent
        return spent or Spent()

    def summary(self) -> str:
        """The run's outcome as a short table."""
        total, active = self.engine.sparkling.parameters
        lines = [f"{'validation loss':<16}{'step':>8}{'loss':>10}"]
        lines += [f"{name:<16}{step:>8}{loss:>10.4f}" for name, step, loss in self.progress.milestones]
        spent = self._spent
        compute = f"compute     {spent.flops:.3e} FLOPs"
        if any(name == "after growth" for name, *_ in self.progress.milestones):
            scratch = 6.0 * active * spent.tokens
            compute += (
                f"; the wide model from scratch takes {scratch:.3e} for as many tokens, and ends at a loss of its own"
            )
        return "\n".join(
            [
                *lines,
                f"parameters  {total:,} ({active:,} active per token)",
                f"tokens      {spent.tokens:,}",
                compute,
            ]
        )


def run(args: argparse.Namespace) -> None:
    """Everything from the parsed command line to the final table."""
    all_ranks = FailTogether("preparing the run")
    with all_ranks:
        variant = Variant(args.variant)
        config = as_variant(read_json(args.deepspeed_config), variant)
        training = TrainingConfig.from_dict(config.get("training", {}), "training")
        model_config = OlmoeConfig.from_dict(config.get("model", {}), "model")
        corpus = Corpus.from_path(args.data) if args.data else Corpus.standard_library()
        corpus.check(length=training.sequence_length, vocabulary=model_config.vocab_size)
        output = _output_directory(args)
    meet(all_ranks)
    output = of_first_rank(output, all_ranks)
    checkpoints = output / "checkpoints"
    with all_ranks:
        _check_checkpoints(checkpoints, resume=args.resume)
    all_ranks.settle()
    config.setdefault("tensorboard", {"enabled": True, "output_path": str(output), "job_name": "tensorboard"})

    torch.manual_seed(training.seed)
    engine = ds_sparkling.initialize(olmoe_factory(model_config), config, checkpoint=checkpoints)
    progress = Progress()
    if args.resume:
        _, client_state = engine.load_checkpoint(str(checkpoints))
        progress = Progress(**client_state["progress"])
    _say(f"training on {corpus.source}: {len(corpus.train):,} tokens, {len(corpus.validation):,} held out")
    job = Job(engine, corpus, training, checkpoints, progress)
    del engine
    with logging_redirect_tqdm():
        job.train()
    drawn = ""
    if job.rank == 0:
        outcome = job.outcome(variant)
        outcome.write(output)
        drawn = draw_losses({variant: outcome}, output / "loss.png")
    _say(f"\n{job.summary()}\ncheckpoints {checkpoints}\n\n{drawn}\nwatch it:   tensorboard --logdir {output}")


def _output_directory(args: argparse.Namespace) -> Path:
    """The run's directory: as given, or else a new one, or that of the latest run to resume."""
    if args.output is not None:
        return Path(args.output)
    name = args.deepspeed_config.stem
    if not args.resume:
        return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    earlier = sorted(Path("runs").glob(f"{name}-*/checkpoints/latest"))
    if not earlier:
        raise CheckpointError(f"--resume: found no run of {args.deepspeed_config} under runs/; pass --output DIR")
    return earlier[-1].parents[1]


def _check_checkpoints(checkpoints: Path, *, resume: bool) -> None:
    """Never go on from nothing, nor write among another run's checkpoints."""
    latest = checkpoints / "latest"
    if resume and not latest.is_file():
        raise CheckpointError(f"--resume: there is no checkpoint in {checkpoints}")
    if not resume and latest.is_file():
        raise CheckpointError(f"{checkpoints} holds checkpoints; pass --resume to go on, or another --output DIR")


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def train(args: argparse.Namespace) -> None:
    """Join the other ranks and run the job, once per rank; ends the process with status 2 if the user can mend it.

    Args:
        args: the parsed command line (:func:`~ds_sparkling.job.command.job_parser`).
    """
    logging.basicConfig(format="%(message)s")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Every engine asks its scheduler for a rate before the first step, and is warned of it.
    deepspeed.utils.logger.addFilter(lambda record: not record.getMessage().startswith("Attempting to get learning"))
    # DeepSpeed calls collectives by names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warn_of_left_locks()
    deepspeed.init_distributed()
    try:
        run(args)
    except SparklingError as error:
        if dist.get_rank() == 0:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        dist.destroy_process_group()
