"""Lines of the package, each broken on purpose: tests have to notice every one of them.

    python tools/broken_lines.py [WORD ...] [--without-ranks]

Each is broken in a copy of the checkout, and the tests that catch it are run there, which takes some minutes in all.
Words choose those whose file or tests have one of them in their name. Add a line whenever a fault slips through.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_COPIED = ("ds_sparkling", "tests", "tools", "docs", "configs", "pyproject.toml", "README.md", "CHANGELOG.md")


@dataclass(frozen=True)
class BrokenLine:
    """One fault.

    Attributes:
        file: in the package.
        old: text that stands in it exactly once.
        new: what takes its place.
        tests: the arguments to pytest that choose tests of which at least one has to fail.
        ranks: whether those start ranks.
    """

    file: str
    old: str
    new: str
    tests: str
    ranks: bool = False

    @property
    def path(self) -> Path:
        return Path("ds_sparkling") / self.file

    def broken(self) -> str:
        """The text of the file with the line broken.

        Raises:
            ValueError: if the old text isn't there exactly once.
        """
        text = (ROOT / self.path).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.path} has {self.old!r} {text.count(self.old)} times, expected once; bring the list in "
                "tools/broken_lines.py up to date"
            )
        return text.replace(self.old, self.new)


BROKEN_LINES = (
    # -- the factors of a growth, its units and births
    BrokenLine("growth/scaling.py", "math.sqrt(1 + 3 * c)", "math.sqrt(1 + 2 * c)", "tests/growth/test_scaling.py"),
    BrokenLine("growth/scaling.py", "fan_in=shares / (m * a),", "fan_in=shares / m,", "tests/growth/test_function.py"),
    BrokenLine(
        "growth/scaling.py", "head_gain=shares * (d / d_new),", "head_gain=shares,", "tests/growth/test_function.py"
    ),
    BrokenLine(
        "growth/scaling.py",
        "factors * self.stretch**-dim.power",
        "factors * self.stretch**dim.power",
        "tests/growth/test_widen.py -k multiplier",
    ),
    BrokenLine(
        "growth/scaling.py",
        "torch.where(m > 1, m * parts / totals, 1.0)",
        "torch.where(m > 1, parts / totals, 1.0)",
        "tests/growth/test_scaling.py tests/growth/test_widen.py -k 'split or share or twins'",
    ),
    BrokenLine("growth/units.py", "per_after % per_before\n", "per_after\n", "tests/growth/test_units.py"),
    BrokenLine(
        "growth/units.py",
        "sign[new[:, half:]] = -1.0",
        "sign[new[:, half:]] = 1.0",
        "tests/growth/test_units.py tests/growth/test_widen.py -k 'pair or cancel'",
    ),
    BrokenLine("growth/births.py", "birth = max(run.birth, floor)", "birth = run.birth", "tests/growth/test_births.py"),
    BrokenLine(
        "growth/births.py",
        "width = min(row - column, high - low)",
        "width = row - column",
        "tests/growth/test_births.py",
    ),
    BrokenLine("growth/random.py", '{seed}/{growth}/{name}"', '{seed}/{name}"', "tests/growth/test_random.py"),
    BrokenLine("growth/survey.py", "(high << _BITS) + low", "low", "tests/growth/test_survey.py"),
    BrokenLine("growth/noise.py", "1.0 - 2.0 *", "1.0 + 2.0 *", "tests/growth/test_widen.py -k perturbation"),
    BrokenLine("growth/schedule.py", "0.5 * (peak - end) * (1.0", "0.5 * peak * (1.0", "tests/growth/test_schedule.py"),
    BrokenLine(
        "growth/schedule.py",
        "if age >= self.base.remaining:",
        "if age > self.base.remaining:",
        "tests/growth/test_schedule.py tests/optim/test_scheduler.py",
    ),
    # -- which rank holds what, and what a run remembers
    BrokenLine(
        "spec/partition.py", "return -(-numel // ranks)", "return numel // ranks + 1", "tests/spec/test_partition.py"
    ),
    BrokenLine("spec/partition.py", "if filled >= limit:", "if filled > limit:", "tests/checkpoint/test_layout.py"),
    BrokenLine(
        "spec/partition.py", "if filled + size > limit:", "if filled > limit:", "tests/checkpoint/test_layout.py"
    ),
    BrokenLine(
        "spec/partition.py", "min(size - offset, stop - start)", "size - offset", "tests/spec/test_partition.py"
    ),
    BrokenLine(
        "spec/record.py",
        "growth.widths.get(axis, widths[-1])",
        "growth.widths.get(axis, widths[0])",
        "tests/spec/test_record.py",
    ),
    BrokenLine(
        "spec/record.py", "if type(found) is int and found > _FORMAT:", "if False:", "tests/spec/test_record.py"
    ),
    # -- what the config refuses
    BrokenLine("spec/axes.py", "if not widths:", "if False:", "tests/spec/test_config.py"),
    BrokenLine(
        "spec/config.py",
        "if second.at_step <= first.at_step:",
        "if second.at_step < first.at_step:",
        "tests/spec/test_config.py",
    ),
    BrokenLine(
        "spec/config.py",
        "if key != BLOCK and difflib",
        "if False and difflib",
        "tests/spec/test_config.py",
    ),
    # -- the optimizer's step by birth, and rates
    BrokenLine(
        "optim/scheduler.py",
        "tuple(birth.older() for birth in self.births)",
        "tuple(birth for birth in self.births)",
        "tests/optim/test_scheduler.py",
    ),
    BrokenLine(
        "optim/scheduler.py",
        "return Phase(last < scheduler.warmup_num_steps, base)",
        "return Phase(False, base)",
        "tests/optim/test_scheduler.py",
    ),
    BrokenLine("optim/step.py", "value.clamp(max=treatment.age) if", "value.clone() if", "tests/optim/test_step.py"),
    BrokenLine("optim/step.py", "part.put(param.data, piece)", "pass", "tests/optim/test_step.py"),
    BrokenLine(
        "optim/weight_norm.py",
        "squares / squares[:, :1].clamp(min=1e-300), 1.0).sqrt()",
        "squares / squares[:, :1].clamp(min=1e-300), 1.0)",
        "tests/optim/test_weight_norm.py",
    ),
    # -- models read and tried
    BrokenLine(
        "discovery/roles.py",
        "return [(out, into) if ndim == 2 else (out,)], True\n    if _norm",
        "return [(into, out) if ndim == 2 else (out,)], True\n    if _norm",
        "tests/discovery/test_roles.py tests/discovery/test_read_families.py",
    ),
    BrokenLine(
        "discovery/roles.py",
        'Norm.LAYER if "layernorm" in place.kind else Norm.RMS',
        "Norm.RMS",
        "tests/discovery/test_roles.py tests/discovery/test_trials.py tests/discovery/test_find_axes.py",
    ),
    BrokenLine("discovery/moves.py", "found.fixed + 3 * moving", "found.fixed + 2 * moving", "tests/discovery"),
    BrokenLine(
        "discovery/comparison.py",
        "return self.difference <= tolerance(_dtype(self.narrow))",
        "return True",
        "tests/discovery/test_trials.py tests/discovery/test_find_axes.py tests/discovery/test_proof.py",
    ),
    BrokenLine(
        "check/promise.py",
        "if not low <= row.ratio / row.expected <= high:",
        "if False:",
        "tests/check/test_growth_report.py -k 'bands or breaks'",
    ),
    BrokenLine(
        "check/promise.py",
        "{ModuleLevel.LAYER: (least, LAYER_BAND)}",
        "{}",
        "tests/check/test_growth_report.py -k 'every_strategy'",
    ),
    # -- plans, reports and alarms
    BrokenLine(
        "planner/memory.py",
        "* _FP32 * (1 + setting.states)\n    old_frozen",
        "* _FP32 * setting.states\n    old_frozen",
        "tests/planner/test_memory.py",
    ),
    BrokenLine(
        "planner/memory.py",
        "for old, wide in zip(before, after, strict=True)",
        "for old, wide in zip(before, before, strict=True)",
        "tests/planner/test_memory.py tests/planner/test_against_engine.py",
        ranks=True,
    ),
    BrokenLine(
        "planner/compute.py",
        "6.0 * active * tokens * (stop - start)",
        "6.0 * active * tokens * stop",
        "tests/planner/test_compute.py",
    ),
    BrokenLine("report/verdict.py", "if gap <= band:", "if gap > band:", "tests/report/test_verdict.py"),
    BrokenLine("report/verdict.py", "abs(jump.size) <= _KEPT", "jump.size <= _KEPT", "tests/report/test_verdict.py"),
    BrokenLine(
        "report/facts.py", "losses.samples == growth.samples", "losses.samples >= growth.samples", "tests/report"
    ),
    BrokenLine(
        "monitoring/alarms.py", "if loss <= threshold:", "if loss >= threshold:", "tests/monitoring/test_alarms.py"
    ),
    BrokenLine("monitoring/alarms.py", "self._raised.add(growth)", "pass", "tests/monitoring/test_alarms.py"),
    BrokenLine(
        "monitoring/twin_distance.py", "units.transpose(3, 4)", "units", "tests/monitoring/test_twin_distance.py"
    ),
    BrokenLine(
        "monitoring/expert_load.py", "sums[1] += len(scores_NE)", "sums[1] += 1", "tests/monitoring/test_statistics.py"
    ),
    # -- checkpoints
    BrokenLine("checkpoint/layout.py", "base = expert_rank * numel", "base = 0", "tests/checkpoint/test_layout.py"),
    BrokenLine(
        "checkpoint/layout.py",
        "part * self.settings.expert_parallel + expert_rank if",
        "expert_rank * self.settings.expert_parallel + part if",
        "tests/checkpoint/test_layout.py",
    ),
    BrokenLine(
        "checkpoint/publish.py",
        "            sync_tree(data)\n",
        "",
        "tests/checkpoint/test_full_disk.py -k brought",
        ranks=True,
    ),
    BrokenLine(
        "checkpoint/publish.py",
        "os.rename(data, out)",
        "shutil.copytree(data, out)",
        "tests/checkpoint/test_killed.py -k absent",
        ranks=True,
    ),
    BrokenLine(
        "checkpoint/pickles.py",
        "if entry.CRC:",
        "if False:",
        "tests/checkpoint/test_corrupted_files.py -k flipped_byte_of",
        ranks=True,
    ),
    BrokenLine(
        "checkpoint/pickles.py",
        "mmap=True, weights_only=True",
        "mmap=True, weights_only=False",
        "tests/checkpoint/test_untrusted.py -k 'code_in'",
        ranks=True,
    ),
    # -- engines
    BrokenLine(
        "engine/move_shards.py",
        "widener.weight(arrival.elements, made, piece.start, statistics)",
        "widener.weight(arrival.elements, made, 0, statistics)",
        "tests/engine/test_parity.py -k ranks2-stage3-ep2",
        ranks=True,
    ),
    BrokenLine(
        "engine/exchange.py",
        "sorted(self._sent[bucket])",
        "reversed(sorted(self._sent[bucket]))",
        "tests/engine/test_parity.py -k ranks2-stage2",
        ranks=True,
    ),
    BrokenLine(
        "engine/optimizers/windows.py",
        "start = max(offset - rank * flat.numel(), 0) if",
        "start = max(offset, 0) if",
        "tests/engine/test_parity.py -k ranks2-stage1",
        ranks=True,
    ),
    BrokenLine(
        "engine/optimizers/zero3.py",
        "compute.copy_(master)",
        "pass",
        "tests/engine/test_parity.py tests/engine/test_grow.py -k 'stage3 and bf16'",
        ranks=True,
    ),
    BrokenLine(
        "engine/carry_over.py",
        "torch.set_rng_state(states[2])",
        "pass",
        "tests/engine/test_grow.py -k random_state",
        ranks=True,
    ),
    BrokenLine(
        "engine/carry_over.py",
        "group.update(self._groups[origin])",
        "pass",
        "tests/engine/test_grow.py -k 'random_state or continues'",
        ranks=True,
    ),
    BrokenLine(
        "engine/gradients.py",
        "return adapter_of(self._engine).gradients_elsewhere and",
        "return False and",
        "tests/engine/test_gradients.py",
        ranks=True,
    ),
    BrokenLine(
        "engine/checkpoints.py",
        "replace(run.record, spent=run.spent).write(Path(save_dir) / tag)",
        "pass",
        "tests/engine/test_resume.py",
        ranks=True,
    ),
    BrokenLine(
        "engine/fail_together.py",
        "call.fail(self._failure(error), now=True)",
        "call.fail(self._failure(error))",
        "tests/engine/test_fail_together.py -k 'in_a_collective and raises'",
        ranks=True,
    ),
    BrokenLine(
        "engine/rollcall.py",
        'if first["alike"] != alike:',
        "if False:",
        "tests/engine/test_fail_together.py -k something",
        ranks=True,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only those whose file or tests have it in their name")
    parser.add_argument("--without-ranks", action="store_true", help="only those that tests without ranks catch")
    given = parser.parse_args(arguments)
    chosen = [
        line
        for line in BROKEN_LINES
        if (not given.words or any(word in f"{line.file} {line.tests}" for word in given.words))
        and not (given.without_ranks and line.ranks)
    ]
    missed = [line for number, line in enumerate(chosen, start=1) if not _told(line, f"{number}/{len(chosen)}")]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} broken lines are caught")
    return 1 if missed else 0


def _told(line: BrokenLine, number: str) -> bool:
    caught = is_caught(line)
    print(f"{number} {'caught' if caught else 'MISSED'}: {line.path}: {line.new.strip()!r} by {line.tests}", flush=True)
    return caught


def is_caught(line: BrokenLine) -> bool:
    """Whether a test fails in a copy of the checkout in which the line is broken."""
    with tempfile.TemporaryDirectory(prefix="broken-") as directory:
        copy = Path(directory)
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        (copy / line.path).write_text(line.broken())
        return _exit_code(copy, line.tests) == 1  # 1: tests have failed; others: none was found, say


def _exit_code(copy: Path, tests: str) -> int:
    """That of pytest in a copy of the checkout; in a fork, which has torch imported."""
    import shlex

    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(copy)
            os.environ["PYTHONPATH"] = str(copy)
            sys.path.insert(0, str(copy))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
