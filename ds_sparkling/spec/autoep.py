"""The names that a mixture-of-experts block has in the model as built, and those that DeepSpeed's AutoEP gives it.

AutoEP turns a block's stacked experts into ``experts.w1``, ``.w2``, ``.w3`` and its router into ``router.gate``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_sparkling.errors import PlanError
from ds_sparkling.spec.axes import FIXED, ParamAxes, Role

#: What DeepSpeed calls the parts of a rewritten block, besides its experts.
_ROUTER, _SHARED, _SHARED_GATE = "router", "shared_experts", "shared_experts_gate"
#: Presets whose models call their shared experts otherwise than the others.
_SHARED_OF_PRESETS = {"qwen3_moe": "shared_expert", "qwen3_5_moe": "shared_expert"}


@dataclass(frozen=True, kw_only=True)
class BlockNames:
    """What a block of the model as built calls its parts.

    Attributes:
        router: its router, a linear map.
        experts: the module that holds the experts.
        gate: the gate projection of an expert; both gate and up, end to end, if ``up`` is None.
        down: the down projection.
        up: the up projection, if it is a weight of its own.
        shared: the shared experts, if it has any.
        shared_gate: what gates their output, if anything does.
    """

    router: str = "gate"
    experts: str = "experts"
    gate: str = "gate_up_proj"
    down: str = "down_proj"
    up: str | None = None
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"

    @classmethod
    def from_config(cls, ds_config: Mapping[str, Any]) -> BlockNames:
        """Those that the ``"expert_parallel"`` block gives; the defaults are those of all of DeepSpeed's presets."""
        block = ds_config.get("expert_parallel") or {}
        return cls(
            router=block.get("router_pattern") or cls.router,
            experts=block.get("expert_pattern") or cls.experts,
            gate=block.get("expert_w1") or cls.gate,
            down=block.get("expert_w2") or cls.down,
            up=block.get("expert_w3", cls.up),
            shared=block.get("shared_experts_pattern")
            or _SHARED_OF_PRESETS.get(str(block.get("preset_model")), cls.shared),
            shared_gate=block.get("shared_experts_gate_pattern") or cls.shared_gate,
        )

    def found_in(self, block: str, names: Collection[str]) -> BlockNames:
        """These, with the shared experts that the parameters ``names`` have at the path ``block``.

        DeepSpeed finds its preset by the model's type if the config names none.
        """
        known = (self.shared, *_SHARED_OF_PRESETS.values())
        shared = next((s for s in known if any(name.startswith(f"{block}.{s}.") for name in names)), self.shared)
        return replace(self, shared=shared)

    def built(self, name: str, block: str) -> str:
        """What a parameter of the rewritten block, but for its experts, is called in the model as built."""
        for moved, own in ((_ROUTER, self.router), (_SHARED, self.shared), (_SHARED_GATE, self.shared_gate)):
            prefix = f"{block}.{moved}."
            if name.startswith(prefix):
                return f"{block}.{own}.{name.removeprefix(prefix).removeprefix('gate.' if moved == _ROUTER else '')}"
        return name


def block_axes(block: str, names: BlockNames, axes: Mapping[str, ParamAxes]) -> dict[str, ParamAxes]:
    """The axes of a rewritten block's parameters, by AutoEP's names.

    Args:
        block: the path of the block's module.
        axes: of the model as built.

    Raises:
        PlanError: if the model as built has no such experts.
    """

    def of(leaf: str) -> ParamAxes:
        stacked = axes.get(f"{block}.{names.experts}.{leaf}")
        if stacked is not None:
            return stacked
        single = axes.get(f"{block}.{names.experts}.0.{leaf}.weight")
        if single is None:
            raise PlanError(f"{block}: found no expert weight {leaf!r} under {names.experts!r} in the model as built")
        return ParamAxes((FIXED, *single.dims), stacked_experts=True)

    gate = of(names.gate)
    renamed = {
        f"{block}.experts.w1": _half(gate, alive=(0,)),
        f"{block}.experts.w2": of(names.down),
        f"{block}.experts.w3": _half(gate, alive=()) if names.up is None else of(names.up),
    }
    names = names.found_in(block, axes)
    for kind in ("weight", "bias"):
        source = f"{block}.{names.router}.{kind}"
        if source in axes:
            renamed[f"{block}.{_ROUTER}.gate.{kind}"] = axes[source]
    correction = axes.get(f"{block}.{names.router}.e_score_correction_bias")
    if correction is not None:
        renamed[f"{block}.{_ROUTER}.e_score_correction_bias"] = correction
    for moved, own in ((_SHARED, names.shared), (_SHARED_GATE, names.shared_gate)):
        prefix = f"{block}.{own}."
        for source in axes:
            if source.startswith(prefix):
                renamed[f"{block}.{moved}.{source.removeprefix(prefix)}"] = axes[source]
    return renamed


def _half(fused: ParamAxes, alive: tuple[int, ...]) -> ParamAxes:
    """One of the two segments of a fused gate-and-up weight, as a tensor of its own."""
    dims = tuple(replace(dim, segments=1, alive=alive) if dim.role is Role.FAN_OUT else dim for dim in fused.dims)
    return replace(fused, dims=dims)
