"""Models with buffers, frozen experts and empty parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import checkpoint_files
import tiny
from distributed import Workers
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.growth.plan_in_words import plan_in_words
from tiny import Case

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


# -- buffers that follow a width -----------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A language model whose checkpoints hold buffers that are as long as its widths, one of them of integers."""

    shift: torch.Tensor
    kind: torch.Tensor

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(tokens, width), nn.RMSNorm(width), nn.Linear(width, tokens)
        self.mix = nn.Linear(width, width)
        self.register_buffer("shift", torch.linspace(-1, 1, width))
        self.register_buffer("kind", torch.arange(tokens) % 3)
        self.register_buffer("counts", torch.arange(5.0))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.kind[input_ids][..., None]
        logits: torch.Tensor = self.head(self.norm(x + self.mix(self.norm(x)) + self.shift))
        return logits


def build_shifted(width: int = 6, tokens: int = tiny.VOCABULARY) -> nn.Module:
    torch.manual_seed(1)
    return Shifted(width, tokens)


def grow_buffers(stage: int, directory: str) -> Any:
    """Train, count, save, grow, save; what the buffers are then."""
    import ds_sparkling

    config = {**Case(2, stage).config, "sparkling": {}}
    engine: Any = ds_sparkling.initialize(build_shifted, config)
    tokens, labels = tiny.batch(0)
    loss = nn.functional.cross_entropy(engine(tokens).flatten(0, 1), labels.flatten())
    engine.backward(loss)
    engine.step()
    engine.module.shift += 1
    engine.module.counts += 1
    engine.save_checkpoint(directory, tag="before")
    engine = ds_sparkling.grow(engine, SHIFTED_WIDE)
    engine.save_checkpoint(directory, tag="after")
    return {name: buffer.tolist() for name, buffer in engine.module.named_buffers()}, plan_in_words(
        engine.sparkling.plan
    )


SHIFTED_WIDE = {"width": 9, "tokens": 33}


@pytest.mark.parametrize("stage", [3, 1])
def test_buffers_grow_along_online_and_offline_alike(
    stage: int, workers: Callable[[int], Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    (buffers, plan), *_ = workers(2).run(grow_buffers, stage, str(saved))
    shift = (torch.linspace(-1, 1, 6) + 1).tolist()
    assert buffers["shift"] == [*shift, *shift[:3]]
    assert buffers["kind"] == [token % 3 for token in [*range(tiny.VOCABULARY), 0, 1]]
    assert buffers["counts"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert "2 buffers grow along" in plan
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options: dict[str, Any] = {"tag": "before", "config": "test_odd_models:build_shifted"}
    checkpoint_files.run(saved, tmp_path / "wide", SHIFTED_WIDE, **options)
    checkpoint_files.same_files(saved / "after", tmp_path / "wide/before")
