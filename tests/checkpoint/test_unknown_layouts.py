"""Checkpoints of runs that are parallel in ways this package doesn't know are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic_checkpoint import config_of, write_checkpoint
from ds_sparkling.checkpoint.metadata import refuse_unknown
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.errors import UnsupportedError


def test_a_checkpoint_cut_by_tensor_parallelism_is_refused_by_its_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_of(100_000), ranks=1, expert_parallel=1)
    (tag,) = (path for path in tmp_path.iterdir() if path.is_dir())
    open_checkpoint(tag)
    (tag / "zero_pp_rank_0_mp_rank_01_model_states.pt").touch()  # as AutoTP's second rank writes it
    with pytest.raises(UnsupportedError, match=r"zero_pp_rank_0_mp_rank_01_model_states\.pt.*tensor or model parallel"):
        open_checkpoint(tag)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"mp_world_size": 2}, "tensor or model parallelism"),
        ({"num_experts": [4], "ds_autoep_layers": None}, "native DeepSpeed MoE layers"),
        ({"ds_config": {"sequence_parallel_size": 2}}, "sequence parallelism"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_parallelism_is_told_by_the_metadata(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^here: .*{reason}"):
        refuse_unknown("here", model)
    refuse_unknown("here", {"mp_world_size": 1, "ds_config": {"sequence_parallel_size": 1}})
