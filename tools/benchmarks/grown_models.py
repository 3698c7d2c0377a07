"""The models that the growth benchmark grows, and what one repetition of a case gives. Needs no DeepSpeed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

from ds_sparkling.discovery.build import build_on_meta
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM

_LAYERS = 4
_EXPERTS = 8
#: Parameters of all experts (gate, up, down) per unit of hidden x inner width.
_PER_AREA = 3 * _EXPERTS * _LAYERS


@dataclass(frozen=True)
class GrowthCase:
    """What to measure: how many ranks, with how many threads each, and the model's size before the growth."""

    ranks: int
    parameters: int
    repeat: int
    threads: int

    @cached_property
    def model(self) -> OlmoeConfig:
        """A model of about ``parameters`` parameters, nearly all of them in its experts; its widths are x16."""
        hidden = max(int(math.sqrt(self.parameters / (_PER_AREA / 2))) // 32 * 32, 32)
        rest = _count(_config(hidden, 16)) - _PER_AREA * hidden * 16
        inner = math.ceil((self.parameters - rest) / (_PER_AREA * hidden) / 16) * 16
        return _config(hidden, max(inner, 16))

    @property
    def narrow(self) -> dict[str, int]:
        """The widths before the growth."""
        model = self.model
        return {"hidden_size": model.hidden_size, "moe_intermediate_size": model.moe_intermediate_size}

    @property
    def wide(self) -> dict[str, int]:
        """The widths after the growth: twice those before."""
        return {axis: 2 * width for axis, width in self.narrow.items()}

    @property
    def parameters_before(self) -> int:
        return _count(self.model)

    @property
    def parameters_after(self) -> int:
        return _count(self.build_config(**self.wide))

    def build(self, **widths: int) -> OlmoeForCausalLM:
        """The model at ``widths``."""
        return OlmoeForCausalLM(self.build_config(**widths))

    def build_config(self, **widths: int) -> OlmoeConfig:
        """The model's sizes at ``widths``."""
        return OlmoeConfig(**{**asdict(self.model), **widths})


@dataclass(frozen=True)
class Sample:
    """One repetition: times in s on the slowest rank, memory in bytes on the rank with the largest peak / budget."""

    grow: float
    engine_start: float
    memory_copy: float
    through_files: float
    peak: int
    budget: int


def _config(hidden: int, inner: int) -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=_EXPERTS,
        num_experts_per_tok=2,
    )


def _count(config: OlmoeConfig) -> int:
    return sum(param.numel() for param in build_on_meta(lambda: OlmoeForCausalLM(config), {}).parameters())
