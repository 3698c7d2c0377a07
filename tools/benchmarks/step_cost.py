"""An optimizer step after a growth, a whole step of the main job and a diagnosis, each timed against going without."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from benchmarks.common import QUICKSTART, Columns, free_port
from benchmarks.optimizers import OPTIMIZERS
from ds_sparkling.growth import Block, birth_blocks
from ds_sparkling.optim.scheduler import RewarmupScheduler
from ds_sparkling.optim.step import BirthStep
from ds_sparkling.progress import progress_bar
from ds_sparkling.spec.axes import Dim, ParamAxes, Role
from ds_sparkling.spec.config import read_json
from ds_sparkling.spec.strategy import Rewarmup, Strategy

if TYPE_CHECKING:
    pass

# -- the step of one tensor -------------------------------------------------------------------------------------


#: By name, the halves of fan-out and of fan-in that were there at the start and after each growth.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "columns": ((2, 2), (1, 2)),
    "rows": ((1, 2), (2, 2)),
    "columns, then rows": ((1, 1, 2), (1, 2, 2)),
}
_AXES = ParamAxes((Dim("out", Role.FAN_OUT), Dim("in", Role.FAN_IN)))

_STRATEGY = Strategy(rewarmup=Rewarmup(ratio=1.3, steps=10))
#: Steps of the base schedule's cosine: more than are ever taken.
_COSINE = 1_000_000


@dataclass(frozen=True)
class StepCase:
    """What one process measures: ``elements`` are whole rows of ``row``, an even number of them."""

    optimizer: str
    elements: int
    row: int
    threads: int
    repeat: int


@dataclass(frozen=True)
class StepRow:
    """One line of the table, and one object of the JSON file: ms, ratios and bytes per element."""

    optimizer: str
    threads: int
    elements: int
    step: str
    plain_min_ms: float
    plain_median_ms: float
    min_ms: float
    median_ms: float
    ratio: float
    ratio_of_medians: float
    plain_peak: float
    peak: float


COLUMNS: Columns = (
    ("optimizer", "{}"),
    ("threads", "{:d}"),
    ("elements", "{:,d}"),
    ("step", "{}"),
    ("plain min [ms]", "{:.2f}"),
    ("median", "{:.2f}"),
    ("step min [ms]", "{:.2f}"),
    ("median", "{:.2f}"),
    ("ratio", "{:.2f}"),
    ("of medians", "{:.2f}"),
    ("plain peak [B/element]", "{:.2f}"),
    ("peak", "{:.2f}"),
)
LEGEND = """\
plain: the optimizer's own step. step: with the elements' births told apart, or by hand (see --help). peak: memory
that a step takes for itself.
"""


def blocks_of(layout: str, elements: int, row: int) -> list[Block]:
    """The births of a matrix of ``elements`` in rows of ``row``, by a name in :data:`LAYOUTS`."""
    shape = (elements // row, row)
    widths = {
        axis: tuple(half * size // 2 for half in halves)
        for axis, size, halves in zip(("out", "in"), shape, LAYOUTS[layout], strict=True)
    }
    return birth_blocks(_AXES, shape, widths, 0, elements)


class _Grown:
    """A flat tensor under an optimizer that tells births apart.

    Attributes:
        plain: the optimizer's own step.
        step: the step that has taken its place.
    """

    def __init__(self, case: StepCase) -> None:
        torch.manual_seed(0)
        self.case = case
        self.param = torch.nn.Parameter(torch.randn(case.elements))
        self.param.grad = torch.randn(case.elements)
        optimizer = OPTIMIZERS[case.optimizer]([self.param])
        self.scheduler = RewarmupScheduler(CosineAnnealingLR(optimizer, _COSINE), optimizer)
        for _ in range(len(LAYOUTS)):  # old elements must be older than new ones
            optimizer.step()
            self.scheduler.step()
        self.plain: Callable[[], Any] = optimizer.step
        self._births = BirthStep(optimizer, self.scheduler, {self.param: 0}, self._blocks)
        self.step: Callable[[], Any] = optimizer.step
        self._layout = ""

    def grow(self, layout: str) -> None:
        """Forget all earlier growths, go through those of ``layout``, and take a step."""
        self.scheduler.births = ()
        self._births.forget_blocks()
        self._layout = layout
        for _ in LAYOUTS[layout][0][1:]:
            self.scheduler.born(_STRATEGY)
            self.scheduler.step()
        self.step()

    def meet(self) -> None:
        """Let the new elements grow old, so that their curves have met the base curve, and take a step."""
        self.scheduler.births = tuple(replace(birth, age=_COSINE) for birth in self.scheduler.births)
        self.step()

    @torch.no_grad()
    def by_hand(self, new: Tensor) -> None:
        """A step of ratio times the base rate where ``new`` says so."""
        before = self.param.clone()
        self.plain()
        self.param.copy_(torch.where(new, before.lerp(self.param, _STRATEGY.rewarmup.ratio), self.param))

    @torch.no_grad()
    def by_hand_in_place(self, new: Tensor, before: Tensor) -> None:
        """The same with ``before`` as a buffer."""
        before.copy_(self.param)
        self.plain()
        torch.where(new, before.lerp_(self.param, _STRATEGY.rewarmup.ratio), self.param, out=self.param.data)

    def _blocks(self) -> dict[Tensor, list[Block]]:
        return {self.param: blocks_of(self._layout, self.case.elements, self.case.row)}


def measure(case: StepCase) -> list[StepRow]:
    """All rows of a case, measured in a process of its own."""
    with (
        _environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(case.threads)),
        ProcessPoolExecutor(1, get_context("spawn"), initializer=_keep_off_stdout) as pool,
    ):
        return pool.submit(_rows, case).result()


def _rows(case: StepCase) -> list[StepRow]:
    torch.set_num_threads(case.threads)
    grown = _Grown(case)
    total = (len(LAYOUTS) + 3) * case.repeat
    what = f"{case.optimizer}, {case.elements:,} elements, threads: {case.threads}"
    with progress_bar(total=total, desc=what, unit="step", position=1) as bar:
        rows = []
        for layout in LAYOUTS:
            grown.grow(layout)
            rows.append(_row(f"new {layout}", grown, grown.step, bar))
        grown.grow("columns")
        grown.meet()
        rows.append(_row("curves met", grown, grown.step, bar))
        new = torch.arange(case.elements) % case.row >= case.row // 2
        rows.append(_row("by hand", grown, lambda: grown.by_hand(new), bar))
        buffer = torch.zeros_like(grown.param, requires_grad=False)
        rows.append(_row("by hand, buffer kept", grown, lambda: grown.by_hand_in_place(new, buffer), bar))
    return rows


def _row(name: str, grown: _Grown, step: Callable[[], Any], bar: tqdm) -> StepRow:
    """Measure ``step`` against the plain step."""
    case = grown.case
    plain_peak, peak = _peak(grown.plain), _peak(step)
    times = []
    for _ in range(case.repeat):
        times.append((_milliseconds(grown.plain), _milliseconds(step)))
        grown.scheduler.step()
        bar.update()
    plain, new = zip(*times, strict=True)
    return StepRow(
        optimizer=case.optimizer,
        threads=case.threads,
        elements=case.elements,
        step=name,
        plain_min_ms=min(plain),
        plain_median_ms=statistics.median(plain),
        min_ms=min(new),
        median_ms=statistics.median(new),
        ratio=min(new) / min(plain),
        ratio_of_medians=statistics.median(new) / statistics.median(plain),
        plain_peak=plain_peak / case.elements,
        peak=peak / case.elements,
    )


def _milliseconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def _peak(step: Callable[[], Any]) -> int:
    """Bytes by which this process's resident memory exceeds that before ``step``, at most, while it runs."""
    from benchmarks.one_rank import resident  # imports DeepSpeed

    ctypes.CDLL(None).malloc_trim(0)  # free heap would hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    step()
    return resident("VmHWM") - before


def _keep_off_stdout() -> None:
    """What DeepSpeed prints must not get into the table."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes started meanwhile: OpenMP reads them as early as PyTorch is imported."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- the main job -----------------------------------------------------------------------------------------------

_BIRTH_AWARE, _PLAIN = "birth-aware", "plain"
#: Steps after the growth that don't count.
_SKIP = 20


@dataclass(frozen=True)
class JobRow:
    """The main job's ms per optimizer step after its growth; ratios are to the plain step's."""

    step: str
    steps: int
    mean_ms: float
    median_ms: float
    ratio: float
    ratio_of_medians: float


JOB_COLUMNS: Columns = (
    ("step", "{}"),
    ("steps", "{:d}"),
    ("mean [ms]", "{:.2f}"),
    ("median [ms]", "{:.2f}"),
    ("ratio", "{:.3f}"),
    ("of medians", "{:.3f}"),
)
JOB_LEGEND = "Time per step of the whole main job after its growth, two CPU processes; the run with the least mean.\n"


def job_config(steps: int, *, birth_aware: bool) -> dict[str, Any]:
    """The quickstart's config, shortened to ``steps``, with nothing but training after the growth."""
    config = read_json(QUICKSTART)
    config["training"] |= {"steps": steps, "evaluate_every": steps, "save_every": 0, "log_every": 1}
    config["scheduler"]["params"] |= {"total_num_steps": steps, "warmup_num_steps": round(0.03 * steps)}
    block = config["sparkling"]
    block["growths"][0]["at_step"] = steps // 3
    if not birth_aware:
        block["rewarmup"]["scope"] = "none"
        block["bias_correction"] = "inherit"
    return config


def step_times(directory: Path, *, after: int, batch: int) -> list[float]:
    """Seconds of every optimizer step that followed step ``after``, by the times of the TensorBoard events.

    Args:
        directory: of the event files: one of each engine.
        after: optimizer steps done.
        batch: samples per optimizer step, which the events count in.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    times: dict[int, float] = {}
    for file in directory.glob("events*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if "Train/loss" in events.Tags()["scalars"]:
            times.update((event.step // batch, event.wall_time) for event in events.Scalars("Train/loss"))
    counted = [times[step] for step in range(after, max(times) + 1)]
    return [end - start for start, end in itertools.pairwise(counted)]


def measure_job(steps: int, runs: int) -> list[JobRow]:
    """Run the job birth-aware and plain by turns, ``runs`` times each."""
    best: dict[str, list[float]] = {}
    with progress_bar([_PLAIN, _BIRTH_AWARE] * runs, desc="quickstart", unit="run", leave=True) as bar:
        for name in bar:
            times = _job(steps, birth_aware=name == _BIRTH_AWARE)
            best[name] = min(best.get(name, times), times, key=statistics.mean)
    plain = best[_PLAIN]
    return [
        JobRow(
            step=name,
            steps=len(times),
            mean_ms=statistics.mean(times) * 1e3,
            median_ms=statistics.median(times) * 1e3,
            ratio=statistics.mean(times) / statistics.mean(plain),
            ratio_of_medians=statistics.median(times) / statistics.median(plain),
        )
        for name, times in best.items()
    ]


def _job(steps: int, *, birth_aware: bool) -> list[float]:
    """Run the job once; its own progress bar goes to stderr."""
    config = job_config(steps, birth_aware=birth_aware)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    with tempfile.TemporaryDirectory(prefix="bench-step-") as directory:
        file, output = Path(directory) / "config.json", Path(directory) / "output"
        file.write_text(json.dumps(config))
        command = [*launcher, "--master_port", str(free_port()), "-m", "ds_sparkling.train"]
        subprocess.run(
            [*command, "--deepspeed_config", str(file), "--output", str(output)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        after = config["sparkling"]["growths"][0]["at_step"] + _SKIP
        return step_times(output / "tensorboard", after=after, batch=config["train_batch_size"])


# -- the diagnosis ----------------------------------------------------------------------------------------------

PRICE_COLUMNS: Columns = (
    ("steps", "{:d}"),
    ("without [ms]", "{:.2f}"),
    ("ordinary [ms]", "{:.2f}"),
    ("diagnosed [ms]", "{:.2f}"),
    ("ratio", "{:.4f}"),
)
PRICE_LEGEND = "Times of a step without and with a diagnosis every 50, two CPU processes; see --help.\n"


def diagnosed_config(hidden: int | None, inner: int | None) -> dict[str, Any]:
    """The quickstart's config, if need be with other widths before the growth and twice those after it."""
    config = read_json(QUICKSTART)
    widths = config["sparkling"]["growths"][0]["widths"]
    for axis, width in (("hidden_size", hidden), ("moe_intermediate_size", inner)):
        if width is not None:
            config["model"][axis], widths[axis] = width, 2 * width
    return config
