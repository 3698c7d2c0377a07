"""Hugging Face models through engines and files: bit for bit the reference, whatever their parameters are like.

Between them: query heads that grow alone and with their key/value heads, biases, LayerNorm, 1 + w gains, embeddings
that are scaled by their width, tied heads, transposed and interleaved experts with biases, shared experts, fused qkv,
vocabularies, dimensions of parts (latent attention's ranks and head sizes, queries beside keys and values that stay);
at ratios that aren't whole; twice in a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
import families
import tiny
from benchmarks.family_list import FAMILIES
from distributed import Workers
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, NewIndex, OptimizerState, Strategy

CONFIGS = {family.name: (dict(family.config), family.preset) for family in FAMILIES}
CONFIGS["Phi-3"] = (families.FAMILIES["phi3"], None)
HIDDEN, INNER, DENSE = "hidden_size", "moe_intermediate_size", "intermediate_size"
SHARED = "shared_expert_intermediate_size"
HEADS, SHARED_HEADS, VOCABULARY = "num_attention_heads", "num_key_value_heads", "vocab_size"
RANK, VALUES, KEYS = "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"
STRATEGIES = (
    Strategy(),
    Strategy(
        fan_out=INIT_PAIRS[1][0],
        fan_in=INIT_PAIRS[1][1],
        norm=Init.RANDOM,
        optimizer_state=OptimizerState.ASYMMETRIC_RESET_SCALED,
        seed=3,
        vocabulary=NewIndex.RANDOM,
    ),
)


@dataclass(frozen=True)
class Run:
    """A family on some topology, and its growths."""

    family: str
    ranks: int
    stage: int
    growths: tuple[dict[str, int], dict[str, int]]
    bf16: bool = False
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}-ranks{self.ranks}-stage{self.stage}"

    @property
    def config(self) -> dict[str, Any]:
        preset = CONFIGS[self.family][1]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage, **self.zero},
            "bf16": {"enabled": self.bf16},
            "steps_per_print": 10**9,
        }
        if preset is not None:
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": self.ranks,
                "preset_model": preset,
                "use_grouped_mm": False,
            }
        return config


RUNS = (
    Run("GPT-OSS", 3, 3, ({HEADS: 8}, {HIDDEN: 48, DENSE: 70, VOCABULARY: 71}), zero={"sub_group_size": 3000}),
    Run("Qwen2-MoE", 2, 3, ({HEADS: 6, SHARED_HEADS: 3, SHARED: 50}, {HIDDEN: 40, INNER: 30})),
    Run("DeepSeek-V3", 2, 2, ({INNER: 30, DENSE: 50}, {HEADS: 6, SHARED_HEADS: 6, HIDDEN: 48})),
    Run("DeepSeek-V3", 2, 3, ({RANK: 18, VALUES: 9, HIDDEN: 48}, {KEYS: 12, VALUES: 13, RANK: 20})),
    Run("Phi-3", 2, 3, ({HEADS: 6}, {HEADS: 9, SHARED_HEADS: 3, HIDDEN: 48}), zero={"sub_group_size": 3000}),
    Run("Gemma", 2, 2, ({HIDDEN: 56, VOCABULARY: 70}, {HEADS: 8}), bf16=True),
    Run("GPT-2", 2, 1, ({HIDDEN: 64, HEADS: 8}, {VOCABULARY: 80})),
)  # fmt: skip


def chain(run: Run, directory: str) -> list[tuple[Any, str, Any]]:
    """Train, save, grow, save, train ...; (state before, plan, state after) of each growth on this rank."""
    import ds_sparkling
    from benchmarks.family_ranks import runnable
    from ds_sparkling.discovery.factory import HuggingFaceFactory

    torch.manual_seed(0)
    engine = ds_sparkling.initialize(runnable(HuggingFaceFactory(CONFIGS[run.family][0])), run.config)
    tokens = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    seen = []
    for number, (widths, strategy) in enumerate(zip(run.growths, STRATEGIES, strict=True)):
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        tiny.with_strategy(engine, strategy)
        before = tiny.local_state(engine)
        engine.save_checkpoint(directory, tag=f"before{number}")
        engine = ds_sparkling.grow(engine, widths)
        engine.save_checkpoint(directory, tag=f"after{number}")
        seen.append((before, engine.sparkling.plan, tiny.local_state(engine)))
    return seen


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_engine_files_and_reference_agree(run: Run, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    saved, config = tmp_path / "saved", tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS[run.family][0]))
    answers = workers(run.ranks).run(chain, run, str(saved))
    for number, ranks in enumerate(zip(*answers, strict=True)):
        plan = ranks[0][1]
        expected, found = tiny.reference(plan, tiny.join([r[0] for r in ranks])), tiny.join([r[2] for r in ranks])
        assert expected.keys() == found.keys()
        for name, tensors in expected.items():
            for key, tensor in tensors.items():
                assert torch.equal(found[name][key], tensor), f"growth {number}: {key} of {name}"
        block = checkpoint_files.block_of(STRATEGIES[number], tmp_path / "ds.json")
        options: dict[str, Any] = {"tag": f"before{number}", "deepspeed_config": block, "config": str(config)}
        checkpoint_files.run(saved, tmp_path / f"{number}", run.growths[number], **options)
        checkpoint_files.same_files(saved / f"after{number}", tmp_path / f"{number}/before{number}")


def grown_after_an_early_import() -> tuple[float, float]:
    """Loss before and after a growth, where transformers' classes are imported before DeepSpeed looks for any."""
    from transformers import AutoModelForCausalLM  # noqa: F401

    import ds_sparkling
    from benchmarks.family_ranks import runnable
    from ds_sparkling.discovery.factory import HuggingFaceFactory

    run = Run("GPT-OSS", 2, 3, ({}, {}))
    config = {key: value for key, value in run.config.items() if key != "expert_parallel"}
    engine = ds_sparkling.initialize(runnable(HuggingFaceFactory(CONFIGS[run.family][0])), config)
    tokens = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    before = float(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine = ds_sparkling.grow(engine, {HIDDEN: 64})
    return before, float(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)


def test_a_mixture_that_only_the_first_rank_has_tried_grows_on_all(workers: Callable[[int], Workers]) -> None:
    workers(2).stop()  # ranks that are started anew haven't seen the family's code
    for before, after in workers(2).run(grown_after_an_early_import):
        assert after == pytest.approx(before, rel=1e-5)
