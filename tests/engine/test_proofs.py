"""A growth is tried out once: at the start, and not again when it happens or when the run is resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_sparkling.engine import planning
from ds_sparkling.spec.config import SparklingConfig
from ds_sparkling.spec.record import GrowthRecord, read_record
from ds_sparkling.spec.strategy import Scaling, Strategy

BLOCK = {"stages": [{"at_step": 2, "widths": {"hidden": 16}}, {"at_step": 4, "widths": {"hidden": 32, "inner": 12}}]}


class Net(nn.Module):
    """Token ids to logits."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module, dtype: torch.dtype, eps: float) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(11, hidden), nn.Linear(hidden, inner)
        self.activation, self.down = activation, nn.Linear(inner, hidden)
        self.norm, self.head = nn.LayerNorm(hidden, eps=eps), nn.Linear(hidden, 11)
        self.register_buffer("counts", torch.zeros(3, dtype=dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(self.norm(x + self.down(self.activation(self.up(x)))))


class Build:
    """Builds nets; what isn't a width is an attribute."""

    def __init__(self, activation: type[nn.Module] = nn.GELU, dtype: Any = torch.float32, eps: float = 1e-5) -> None:
        self.activation, self.dtype, self.eps = activation, dtype, eps

    def __call__(self, hidden: int = 8, inner: int = 6) -> nn.Module:
        return Net(hidden, inner, self.activation(), self.dtype, self.eps)


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often axes were found and growths proved since the last ``clear``."""
    calls: Counter[str] = Counter()
    for name in ("axes_to_grow", "prove_growth"):
        original = getattr(planning, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(planning, name, counting)
    return calls


def started(tmp_path: Path, config: SparklingConfig) -> GrowthRecord:
    """The record of a run that has just started, which a checkpoint in ``tmp_path`` holds."""
    record = planning.starting_record(Build(), config, None, None)
    record.write(tmp_path)
    return record


def test_a_planned_growth_is_tried_at_the_start_and_never_again(proofs: Counter[str], tmp_path: Path) -> None:
    config = SparklingConfig.from_dict(BLOCK)
    record = started(tmp_path, config)
    assert proofs == {"axes_to_grow": 1}
    assert record.proved.keys() == {"hidden 8 -> 16", "hidden 16 -> 32, inner 6 -> 12"}
    proofs.clear()
    for step, growth in enumerate(config.growths):
        record = planning.knowing(record, [growth.widths], Build(), config)
        record = record.after(growth.widths, config.strategy, step=step, planned_step=growth.at_step)
        record.write(tmp_path)
        assert planning.starting_record(Build(), config, tmp_path, None) == read_record(tmp_path) == record
    assert not proofs
    assert record.proved == {}  # those of growths that are done have served


def test_a_resumed_run_tries_nothing_again(proofs: Counter[str], tmp_path: Path) -> None:
    config = SparklingConfig.from_dict(BLOCK)
    record = started(tmp_path, config)
    proofs.clear()
    assert planning.starting_record(Build(), config, tmp_path, None).proved == record.proved
    assert not proofs


@pytest.mark.parametrize(
    "build",
    [Build(activation=nn.ReLU), Build(dtype=torch.float64), Build(eps=1e-3)],
    ids=["another class", "another dtype", "another value"],
)
def test_another_model_is_tried_anew(build: Build, proofs: Counter[str], tmp_path: Path) -> None:
    config = SparklingConfig.from_dict(BLOCK)
    record = started(tmp_path, config)
    proofs.clear()
    again = planning.starting_record(build, config, tmp_path, None)
    assert proofs == {"prove_growth": 2}
    assert again.proved.keys() == record.proved.keys()
    assert not set(again.proved.values()) & set(record.proved.values())


def test_another_strategy_or_width_is_tried_anew(proofs: Counter[str], tmp_path: Path) -> None:
    config = SparklingConfig.from_dict(BLOCK)
    record = started(tmp_path, config)
    proofs.clear()
    planning.knowing(record, [{"hidden": 24}], Build(), config)
    assert proofs == {"prove_growth": 1}
    other = SparklingConfig.from_dict({**BLOCK, "scaling": Scaling.FUNCTION.value})
    assert other.strategy != Strategy()
    planning.starting_record(Build(), other, tmp_path, None)
    assert proofs == {"prove_growth": 3}


def test_a_record_without_proofs_is_read_and_proved(proofs: Counter[str], tmp_path: Path) -> None:
    config = SparklingConfig.from_dict(BLOCK)
    data = started(tmp_path, config).to_dict()
    del data["proved"]
    proofs.clear()
    old = GrowthRecord.from_dict(data)
    assert old.proved == {}
    assert planning.knowing(old, [{"hidden": 16}], Build(), config).proved.keys() == {"hidden 8 -> 16"}
    assert proofs == {"prove_growth": 1}


def test_what_was_not_tried_is_not_proved(tmp_path: Path) -> None:
    assert started(tmp_path, SparklingConfig.from_dict({**BLOCK, "check": False})).proved == {}
