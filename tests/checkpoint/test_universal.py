"""Universal checkpoints, DeepSpeed's own and ours: read, written, grown."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint_files
from distributed import Workers
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.errors import UnsupportedError
from tiny import Case

WIDE = {"hidden_size": 13, "moe_intermediate_size": 11}

CASES = [
    Case(2, 3, 2, groups=True),
    Case(3, 3, frozen=True),
    Case(2, 2, 2, bf16=True),
    Case(3, 2, frozen=True, groups=True),
    Case(2, 1, bf16=True, top={"data_types": {"grad_accum_dtype": "fp32"}}),
]


def convert(folder: str, out: str) -> None:
    """DeepSpeed's converter."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=folder,
            output_folder=out,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(case.ranks).run(checkpoint_files.train_and_save, case, str(tmp_path / "saved"))
    saved = tmp_path / "saved/global_step2"
    checkpoint_files.run(tmp_path / "saved", tmp_path / "universal", format="universal")
    assert (tmp_path / "universal/latest_universal").read_text() == "global_step2"
    checkpoint_files.same_tensors(saved, tmp_path / "universal/global_step2")
    checkpoint_files.run(tmp_path / "universal", tmp_path / "back")
    checkpoint_files.same_files(saved, tmp_path / "back/global_step2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_deepspeed_converts_is_read(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(case.ranks).run(checkpoint_files.train_and_save, case, str(tmp_path / "saved"))
    saved, converted = tmp_path / "saved/global_step2", tmp_path / "converted/global_step2"
    workers(1).run(convert, str(saved), str(converted))
    shutil.copy(saved / "ds_sparkling.json", converted)
    assert list(open_checkpoint(converted).check())
    checkpoint_files.same_tensors(saved, converted)
    # Growing it gives what growing the other gives.
    options = {"config": "olmoe_factory:build_tied"}
    checkpoint_files.run(tmp_path / "saved", tmp_path / "first", WIDE, **options)
    checkpoint_files.run(tmp_path / "converted", tmp_path / "second", WIDE, **options)
    checkpoint_files.same_tensors(tmp_path / "first/global_step2", tmp_path / "second/global_step2")


def test_dealt_out_parameters_are_refused(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    """DeepSpeed's own universal checkpoints of round_robin_gradients have the parameters mixed up."""
    case = Case(2, 2, zero={"round_robin_gradients": True})
    workers(2).run(checkpoint_files.train_and_save, case, str(tmp_path / "saved"))
    with pytest.raises(UnsupportedError, match="round_robin_gradients"):
        checkpoint_files.run(tmp_path / "saved", tmp_path / "universal", format="universal")
    converted = tmp_path / "converted/global_step2"
    workers(1).run(convert, str(tmp_path / "saved/global_step2"), str(converted))
    with pytest.raises(UnsupportedError, match="round_robin_gradients"):
        open_checkpoint(converted)


def test_what_deepspeed_cant_load_is_said(
    workers: Callable[[int], Workers], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    top = {"optimizer": optimizer, "zero_allow_untested_optimizer": True}
    workers(2).run(checkpoint_files.train_and_save, Case(2, 3, top=top), str(tmp_path / "saved"))
    checkpoint_files.run(tmp_path / "saved", tmp_path / "universal", format="universal")
    assert "this optimizer keeps ['momentum_buffer']" in caplog.text
    checkpoint_files.same_tensors(tmp_path / "saved/global_step2", tmp_path / "universal/global_step2")
