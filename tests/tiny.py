"""A tiny model and its engine, and ways to look into it, shared by the engine-room tests.

Sizes are chosen so that element counts don't divide by the ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_sparkling.growth import GrowthPlan, Widener
from ds_sparkling.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from ds_sparkling.spec.strategy import Strategy

VOCABULARY = 31
#: name -> {"weight": ..., "exp_avg": ..., ...}, whole logical tensors
State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One way to run the tiny model; picklable, so that it can travel to the ranks."""

    ranks: int = 2
    stage: int = 3
    ep: int = 0
    bf16: bool = False
    tied: bool = True
    frozen: bool = False
    groups: bool = False
    accumulation: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    sparkling: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extras = [f"ep{self.ep}" if self.ep else "dense", "bf16" if self.bf16 else "fp32"]
        extras += [name for name in ("frozen", "groups") if getattr(self, name)]
        return f"ranks{self.ranks}-stage{self.stage}-" + "-".join(extras + [f"{k}={v}" for k, v in self.zero.items()])

    @property
    def build_model(self) -> Callable[..., nn.Module]:
        def build(hidden_size: int = 6, moe_intermediate_size: int = 5, num_hidden_layers: int = 1) -> nn.Module:
            torch.manual_seed(7)
            model = OlmoeForCausalLM(
                OlmoeConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=hidden_size,
                    moe_intermediate_size=moe_intermediate_size,
                    num_hidden_layers=num_hidden_layers,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=4,
                    num_experts=12,
                    num_experts_per_tok=2,
                    tie_word_embeddings=self.tied,
                )
            )
            if self.frozen:
                for layer in model.layers:
                    layer.self_attn.q_proj.weight.requires_grad_(False)  # type: ignore[union-attr]
                    layer.input_layernorm.weight.requires_grad_(False)  # type: ignore[union-attr]
            return model

        return build

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 1.0,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
            },
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": 40, "warmup_num_steps": 3, "cos_min_ratio": 0.01},
            },
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 100000, **self.zero},
            "steps_per_print": 10**9,
            "sparkling": dict(self.sparkling),
            **self.top,
        }
        if self.bf16:
            config["bf16"] = {"enabled": True}
        if self.ep:
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": self.ep,
                "moe_layer_pattern": r"layers\.\d+\.mlp",
                "router_pattern": "gate",
                "expert_pattern": "experts",
                "expert_w1": "gate_up_proj",
                "expert_w2": "down_proj",
                "expert_w3": None,
                "num_experts_attr": "num_experts",
                "top_k_attr": "num_experts_per_tok",
                "score_func": "softmax",
                "score_apply": "post",
                "route_norm": False,
                "use_grouped_mm": False,
            }
        return config


class Logged(logging.Handler):
    """What the package logs, until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logging.getLogger("ds_sparkling").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def close(self) -> None:
        logging.getLogger("ds_sparkling").removeHandler(self)
        super().close()


def kind(case: Case) -> tuple[int, bool]:
    """What makes the greatest difference to how an engine holds a model: its ZeRO stage, and other ranks."""
    return case.stage, case.ranks > 1


def initialize(case: Case, **arguments: Any) -> Any:
    import ds_sparkling

    if case.groups:
        arguments["model_parameters"] = decay_groups
    return ds_sparkling.initialize(case.build_model, case.config, **arguments)


def monitored(engine: Any, write_events: Callable[[list[tuple[str, float, int]]], None]) -> None:
    """Give every rank's engine a monitor that calls ``write_events``."""
    engine.monitor.enabled = True
    engine.monitor.write_events = write_events
    engine.sparkling = replace(engine.sparkling, monitored=True)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only, and a smaller learning rate for the embedding."""
    named = list(model.named_parameters())
    embedding = [p for n, p in named if "embed" in n]
    gains = [p for n, p in named if "norm" in n]
    rest = [p for n, p in named if "embed" not in n and "norm" not in n]
    return [
        {"params": rest, "name": "matrices"},
        {"params": gains, "weight_decay": 0.0, "name": "gains"},
        {"params": embedding, "lr": 1e-3, "name": "embedding"},
    ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's input_ids and labels of a (micro) step, [2, 8] each."""
    rank = torch.distributed.get_rank()
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1000 * step + rank))
    return tokens[:, :-1], tokens[:, 1:]


def train(engine: Any, steps: int) -> list[float]:
    """Train until ``steps`` optimizer steps are done in all; this rank's losses. Batches go by the counters."""
    losses = []
    accumulation = engine.gradient_accumulation_steps()
    while engine.global_steps < steps:
        loss = engine(*batch(engine.global_steps * accumulation + engine.micro_steps % accumulation))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def evaluate(engine: Any) -> float:
    """Loss on a fixed batch, without the load-balancing term."""
    engine.eval()
    with torch.no_grad():
        loss = engine(*batch(10**6))
    engine.train()
    return float(loss)


def local_state(
    engine: Any, keys: Sequence[str] = ("exp_avg", "exp_avg_sq")
) -> tuple[State, dict[str, tuple[int, int]]]:
    """This rank's view of all weights and moments through DeepSpeed's public getters, and its slices of the experts.

    Names are those of the whole model.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from ds_sparkling.engine.logical_names import held_parameters

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links state at the first group's step, before later groups have any.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    held = held_parameters(engine)
    state: State = {}
    for local, param in engine.module.named_parameters():
        name = held[local].name
        if not param.requires_grad:
            state[name] = {"weight": _frozen_weight(param)}
        elif engine.zero_optimization_stage() == 0:
            state[name] = _unpartitioned(engine, param)
        else:
            weight = safe_get_full_fp32_param(param)
            state[name] = {"weight": weight}
            for key in keys:
                state[name][key] = safe_get_full_optimizer_state(param, key)
        state[name] = {key: tensor.detach().clone().cpu() for key, tensor in state[name].items()}
    return state, {logical.name: logical.stack for logical in held.values() if logical.stack is not None}


def _frozen_weight(param: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param] if hasattr(param, "ds_id") else []):
        return param.detach().clone()


def _unpartitioned(engine: Any, param: nn.Parameter) -> dict[str, Tensor]:
    """Weights and moments without ZeRO, where DeepSpeed has no getters."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return {"weight": param.data, **{k: optimizer.state[param][k] for k in ("exp_avg", "exp_avg_sq")}}
    for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for candidate, master in zip(params, masters, strict=True):
            if candidate is param:
                state = optimizer.optimizer.state[master]
                return {"weight": master, **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
    raise AssertionError("no optimizer holds the parameter")


def join(answers: list[tuple[State, dict[str, tuple[int, int]]]]) -> State:
    """The logical state from every rank's: experts side by side, everything else equal on all ranks that have it."""
    joined: State = {}
    for name, first in {name: tensors for state, _ in answers for name, tensors in state.items()}.items():
        if name not in answers[0][1]:
            for found in (state[name] for state, _ in answers if name in state):
                assert all(torch.equal(found[key], value) for key, value in first.items()), name
            joined[name] = first
            continue
        parts = {slices[name]: state[name] for state, slices in answers}
        ordered = [parts[held] for held in sorted(parts)]
        joined[name] = {key: torch.cat([part[key] for part in ordered]) for key in first}
    return joined


def reference(plan: GrowthPlan, state: State) -> State:
    """The one-process growth of a logical state."""
    grown: State = {}
    for name in (param.name for param in plan.params):
        tensors, widener = state[plan.source_of(name)], Widener(plan, name)
        grown[name] = {}
        weights = widener.statistics(tensors["weight"])
        for key, old in tensors.items():
            out = torch.empty(math.prod(widener.after), dtype=old.dtype)
            if key == "weight":
                widener.weight(old, out)
            elif widener.is_weights(key):
                widener.state(key, old, out, 0, widener.statistics(old, weights))
            else:
                widener.state(key, old, out)
            grown[name][key] = out.view(widener.after)
    return grown


def with_strategy(engine: Any, strategy: Strategy) -> None:
    """Let the engine's next growth use ``strategy``."""
    run = engine.sparkling
    engine.sparkling = replace(run, config=replace(run.config, strategy=strategy))
