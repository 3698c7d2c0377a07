"""Models with buffers, frozen experts and empty parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files
import pytest
import tiny
import torch
from distributed import Workers
from tiny import Case
from torch import nn

from ds_sparkling.checkpoint.opening import open_checkpoint

WIDE = {"hidden_size": 12, "moe_intermediate_size": 10}


def odd_engine(case: Case, widths: dict[str, int], exclude: str = "") -> Any:
    """An engine of DeepSpeed alone, of a tiny model with fp32 buffers of all shapes and an empty parameter."""
    import deepspeed

    model: Any = case.build_model(**widths)
    model._buffers = {"scale": torch.tensor(1.5), "table": torch.arange(12.0).view(3, 4)}
    if case.stage < 3:  # which can't train such a parameter
        model.register_parameter("empty", nn.Parameter(torch.empty(3, 0)))
    if exclude:
        model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    config = {key: value for key, value in case.config.items() if key != "sparkling"}
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=[*model.parameters()])
    return engine


def train_and_save(case: Case, directory: str, frozen: str) -> Any:
    engine = odd_engine(case, {}, frozen)
    tiny.train(engine, 4)
    engine.save_checkpoint(directory)
    return tiny.evaluate(engine)


def load(case: Case, directory: str, frozen: str) -> Any:
    engine = odd_engine(case, WIDE, frozen)
    engine.load_checkpoint(directory)
    return tiny.evaluate(engine), engine.module.table.tolist(), float(engine.module.scale)


@pytest.mark.parametrize(
    ("case", "frozen"),
    [
        (Case(2, 3, 2), ""),
        (Case(2, 2, 2, bf16=True), ""),
        (Case(2, 2, 2), "experts"),
        (Case(2, 1, 2), "experts"),
    ],
)
def test_odd_models_grow(case: Case, frozen: str, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    before = workers(2).run(train_and_save, case, str(tmp_path / "saved"), frozen)
    source = open_checkpoint(tmp_path / "saved/global_step4")
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    assert {param.dtype for param in source.layout.params.values()} == {dtype}
    trained = {name: param.trained for name, param in source.layout.params.items()}
    assert trained["layers.0.mlp.experts.w2"] is not bool(frozen)
    axes = {pattern: entry for pattern, entry in AXES.items() if case.stage < 3 or pattern != "empty"}
    hints = tmp_path / "hints.json"
    hints.write_text(json.dumps({"widths": {"hidden_size": 6, "moe_intermediate_size": 5}, "axes": axes}))
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, config=str(hints))
    after = workers(2).run(load, case, str(tmp_path / "wide"), frozen)
    for old, (new, table, scale) in zip(before, after, strict=True):
        assert new == pytest.approx(old, rel=2e-2 if case.bf16 else 1e-5)
        assert (sum(map(sum, table)), scale) == (66.0, 1.5)
    (tmp_path / "saved/config.json").write_text("{}")
    checkpoint_files.run(tmp_path / "saved", tmp_path / "hf", format="hf", config=str(hints), verify=True)
    exported = checkpoint_files.load_tensors(tmp_path / "hf")
    assert case.stage == 3 or exported["empty"].shape == (3, 0)
    assert float(exported["scale"]) == 1.5
    assert exported["table"].shape == (3, 4)
    assert exported["layers.0.mlp.experts.down_proj"].dtype is dtype


def dims(*axes: str) -> dict[str, Any]:
    """``h<`` is the hidden width as fan-in, ``i>`` the inner width as fan-out, ``h=`` a gain."""
    names = {"h": "hidden_size", "i": "moe_intermediate_size"}
    roles = {"<": "fan_in", ">": "fan_out", "=": "gain"}
    return {"dims": [{"axis": names[a[0]], "role": roles[a[1]]} if a else {} for a in axes]}


AXES = {
    "embed_tokens.weight": dims("", "h>"),
    r"layers\.\d+\.(input|post_attention)_layernorm\.weight": {**dims("h="), "norm": "rms"},
    r".*\.(q|k)_norm\.weight": dims(""),
    r".*\.(q|k|v)_proj\.weight": dims("", "h<"),
    r".*\.o_proj\.weight": dims("h>", ""),
    r".*\.router\.gate\.weight": dims("", "h<"),
    r".*\.experts\.w(1|3)": {**dims("", "i>", "h<"), "stacked_experts": True},
    r".*\.experts\.w2": {**dims("", "h>", "i<"), "stacked_experts": True},
    r"norm\.weight": {**dims("h="), "norm": "rms", "head_gain": True},
    "empty": dims("", ""),
}
