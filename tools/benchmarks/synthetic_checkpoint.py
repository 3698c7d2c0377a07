"""A ZeRO-3 checkpoint with AutoEP experts, written to disk without a model or a training step behind it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_sparkling.checkpoint.contents import BLOCK, Contents
from ds_sparkling.checkpoint.layout import Group, Param, Settings, make_layout
from ds_sparkling.checkpoint.metadata import CHECKED_VERSIONS, EXPERT_WEIGHTS
from ds_sparkling.checkpoint.output import Filler
from ds_sparkling.checkpoint.pickles import LossScaler, ZeroStage
from ds_sparkling.checkpoint.source import Source
from ds_sparkling.checkpoint.zero_files import ZeroFiles
from ds_sparkling.discovery.build import build_on_meta
from ds_sparkling.discovery.reading import probe
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.autoep import BlockNames, block_axes
from ds_sparkling.spec.record import GrowthRecord

_TAG = "global_step1"
_STATES = ("exp_avg", "exp_avg_sq")
_AXES = ("hidden_size", "moe_intermediate_size")


def write_checkpoint(directory: Path, config: OlmoeConfig, *, ranks: int, expert_parallel: int) -> int:
    """Write a checkpoint of an OLMoE of random weights and moments, with AdamW's state.

    Returns:
        Bytes of weights and moments.
    """
    source = _Synthetic(config, ranks, expert_parallel)
    contents = Contents(source, None)
    files = ZeroFiles(contents, source.layout, None, "")
    filler = Filler(contents, workers=2)
    filler.fill((directory / _TAG / name, files.build(name)) for name in files.names())
    assert source.record is not None
    source.record.write(directory / _TAG)
    (directory / "latest").write_text(_TAG)
    return contents.bytes


class _Synthetic(Source):
    """A checkpoint that is made up: numbers from one block of noise, wherever they are read."""

    def __init__(self, config: OlmoeConfig, ranks: int, expert_parallel: int) -> None:
        def build(**widths: int) -> OlmoeForCausalLM:
            return OlmoeForCausalLM(OlmoeConfig(**{**asdict(config), **widths}))

        widths = {axis: getattr(config, axis) for axis in _AXES}
        axes = probe(build, widths)
        blocks = [f"layers.{layer}.mlp" for layer in range(config.num_hidden_layers)]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, param in build_on_meta(build, widths).named_parameters():
            block = next((block for block in blocks if name.startswith(f"{block}.")), None)
            if block is None:
                shapes[name] = tuple(param.shape)
            elif f"{block}.experts.w1" not in shapes:
                for made, known in block_axes(block, BlockNames(), axes).items():
                    shapes[made] = known.shape((config.num_experts,) * len(known.dims), widths)
        params = {name: Param(name, shape, torch.float32, expert=".experts." in name) for name, shape in shapes.items()}
        settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        groups = [
            Group({**settings, "name": "dense-params"}, tuple(n for n, p in params.items() if not p.expert)),
            Group(
                {**settings, "name": f"ep_size_{expert_parallel}", "moe": True},
                tuple(n for n, p in params.items() if p.expert),
            ),
        ]
        super().__init__(Path(_TAG))
        self.layout = make_layout(Settings(stage=3, ranks=ranks, expert_parallel=expert_parallel), params, groups)
        self.record = GrowthRecord(widths, dict(axes), tried=tuple(widths))
        self._config = config
        self._blocks = blocks
        self._noise = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02

    @property
    def files(self) -> list[Path]:
        return []

    def check(self, part: int = 0, parts: int = 1) -> Iterator[Path]:
        return iter(())

    def states(self, name: str) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(_STATES, torch.float32)

    def numbers(self, name: str) -> dict[str, Any]:
        return {"step": torch.tensor(1.0)}

    def weight_dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, key: str, start: int, stop: int) -> Iterator[Tensor]:
        while start < stop:
            first = start % BLOCK
            count = min(stop - start, 2 * BLOCK - first)
            yield self._noise[first : first + count]
            start += count

    def model_states(self, rank: int) -> dict[str, Any]:
        layout, experts = self.layout, self._config.num_experts
        dense = [name for name, param in layout.params.items() if not param.expert]
        return {
            "module": OrderedDict((name, torch.empty(0)) for name in dense),
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": None,
            "frozen_param_shapes": {},
            "shared_params": {},
            "frozen_param_fragments": {},
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": 1,
            "global_samples": layout.settings.ranks,
            "dp_world_size": layout.settings.ranks,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": 3}, "expert_parallel": {"enabled": True}},
            "ds_version": CHECKED_VERSIONS[-1],
            "num_experts": [experts],
            "ds_autoep_layers": [self._layer(number, block) for number, block in enumerate(self._blocks)],
        }

    def optimizer_states(self, rank: int) -> dict[str, Any]:
        scaler = LossScaler()
        scaler.__dict__.update(cur_scale=1.0, dynamic=False)
        return {
            "optimizer_state_dict": {
                "zero_stage": ZeroStage(3),
                "loss_scaler": scaler,
                "dynamic_loss_scale": False,
                "overflow": False,
                "partition_count": self.layout.settings.ranks,
                "ds_zero_partition_groups": [],
            },
            "ds_config": self.model_states(0)["ds_config"],
            "ds_version": CHECKED_VERSIONS[-1],
        }

    def _layer(self, number: int, block: str) -> dict[str, Any]:
        """What DeepSpeed says of a layer; what depends on ranks and shapes is made when it is written."""
        experts = self._config.num_experts
        return {
            "moe_layer_id": number,
            "module_path": block,
            "num_experts": experts,
            "expert_placement": {"version": 1, "num_experts": experts},
            "affine_maps": {
                "version": 1,
                "params": {f"{block}.experts.{weight}": None for weight in EXPERT_WEIGHTS},
            },
            "expert_key_prefix": f"{block}.experts",
            "checkpoint_format": "zero3_partitioned",
            "checkpoint_format_version": 1,
        }


def config_of(parameters: int) -> OlmoeConfig:
    """An OLMoE with about so many parameters, nearly all of them in its 16 experts."""
    hidden = max(int(math.sqrt(parameters / (3 * 16 * 4 / 2))) // 64 * 64, 64)
    inner = max(round(parameters / (3 * 16 * 4 * hidden)) // 16 * 16, 16)
    return OlmoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
    )
