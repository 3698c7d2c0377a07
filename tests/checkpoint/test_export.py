"""Hugging Face directories: read by the safetensors library and by transformers, with the engine's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files
import pytest
import torch
from distributed import Workers
from tiny import Case
from torch import Tensor

from ds_sparkling.checkpoint import export
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.source import WEIGHT
from ds_sparkling.errors import CheckpointError

WIDE = {"hidden_size": 12, "moe_intermediate_size": 10}
TINY = {"hidden_size": 6, "moe_intermediate_size": 5, "num_experts": 12}
QWEN = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
QWEN_WIDE = {"hidden_size": 32, "moe_intermediate_size": 16}
IDS = list(range(3, 19))


@pytest.mark.parametrize(
    "case", [Case(2, 3, 2, bf16=True), Case(2, 2, 2, frozen=True), Case(3, 3, tied=False)], ids=str
)
def test_the_tensors_are_the_models_own(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(case.ranks).run(checkpoint_files.train_and_save, case, str(tmp_path / "saved"))
    (tmp_path / "saved/config.json").write_text(json.dumps(TINY))
    checkpoint_files.run(tmp_path / "saved", tmp_path / "hf", format="hf", verify=True)
    found = checkpoint_files.load_tensors(tmp_path / "hf")
    model = case.build_model()
    expected = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16 if case.bf16 else torch.float32}
    source = open_checkpoint(tmp_path / "saved/global_step2")

    def whole(name: str) -> Tensor:
        param = source.layout.params[name]
        weight = source.elements(name, WEIGHT, 0, param.numel).view(param.shape).detach()
        return weight.to(torch.bfloat16 if case.bf16 else torch.float32)

    block = "layers.0.mlp"
    if case.ep:
        parts = [whole(f"{block}.experts.w1"), whole(f"{block}.experts.w3")]
        assert torch.equal(found.pop(f"{block}.experts.gate_up_proj"), torch.cat(parts, dim=1))
        assert torch.equal(found.pop(f"{block}.experts.down_proj"), whole(f"{block}.experts.w2"))
        assert torch.equal(found.pop(f"{block}.gate.weight"), whole(f"{block}.router.gate.weight"))
    for name, tensor in found.items():
        assert torch.equal(tensor, whole(name)), name


def test_large_models_are_cut_into_shards_with_an_index(
    workers: Callable[[int], Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(2).run(checkpoint_files.train_and_save, Case(2, 3, 2), str(tmp_path / "saved"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**TINY, "text_config": {"hidden_size": 6}}))
    checkpoint_files.run(tmp_path / "saved", tmp_path / "one", format="hf", config=str(config))
    monkeypatch.setattr(export, "SHARD_BYTES", 3000)
    checkpoint_files.run(tmp_path / "saved", tmp_path / "many", format="hf", config=str(config))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, many = checkpoint_files.load_tensors(tmp_path / "one"), checkpoint_files.load_tensors(tmp_path / "many")
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert export.widened_config(json.loads(config.read_text()), WIDE)["text_config"] == {"hidden_size": 12}


def test_without_the_models_config_it_is_refused(workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(2).run(checkpoint_files.train_and_save, Case(2, 3, 2), str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=r"needs the model's config\.json.*--config"):
        checkpoint_files.run(tmp_path / "saved", tmp_path / "hf", format="hf")
    with pytest.raises(CheckpointError, match="no moe_intermediate_size"):
        export.widened_config({"hidden_size": 6}, WIDE)
    assert not (tmp_path / "hf").exists()


# -- a Hugging Face model under plain DeepSpeed and AutoEP ------------------------------------------------------------


def qwen_engine(config: dict[str, Any], stage: int) -> Any:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "expert_parallel": {
                "enabled": True,
                "autoep_size": 2,
                "preset_model": "qwen3_moe",
                "use_grouped_mm": False,
            },
            "steps_per_print": 10**9,
        },
    )
    return engine


def logits_of(engine: Any) -> Tensor:
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=torch.tensor([IDS])).logits.float()


def train_qwen(stage: int, directory: str) -> Tensor:
    engine = qwen_engine(QWEN, stage)
    for step in range(3):
        ids = torch.tensor([IDS]) + step
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(directory)
    return logits_of(engine)


def load_qwen(stage: int, directory: str) -> Tensor:
    engine = qwen_engine({**QWEN, **QWEN_WIDE}, stage)
    engine.load_checkpoint(directory)
    return logits_of(engine)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_hugging_face_model_goes_all_the_way(stage: int, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    """Trained and loaded by plain DeepSpeed, exported, loaded by transformers: the same function all the way."""
    from transformers import AutoModelForCausalLM

    config = tmp_path / "config.json"
    config.write_text(json.dumps(QWEN))
    narrow = workers(2).run(train_qwen, stage, str(tmp_path / "saved"))[0]
    options: dict[str, Any] = {"config": str(config)}
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", QWEN_WIDE, **options)
    wide = workers(2).run(load_qwen, stage, str(tmp_path / "wide"))[0]
    assert torch.allclose(wide, narrow, rtol=1e-5, atol=1e-6)
    checkpoint_files.run(tmp_path / "saved", tmp_path / "hf", QWEN_WIDE, format="hf", **options)
    assert json.loads((tmp_path / "hf/config.json").read_text()) == {
        **QWEN,
        **QWEN_WIDE,
        "dtype": "float32",
    }
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        exported = model.eval()(input_ids=torch.tensor([IDS])).logits
    assert torch.allclose(exported, wide, rtol=1e-5, atol=1e-6)
