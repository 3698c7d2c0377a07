"""Hugging Face directories: read by the safetensors library and by transformers, with the engine's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checkpoint_files
from distributed import Workers
from ds_sparkling.checkpoint import export
from ds_sparkling.checkpoint.names import HuggingFaceModel
from ds_sparkling.checkpoint.opening import open_checkpoint
from ds_sparkling.checkpoint.source import WEIGHT
from ds_sparkling.errors import CheckpointError
from tiny import Case

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


# -- names and shapes, held against the config's model ----------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


class Wrapper(nn.Module):
    """As data parallelism wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.module(**inputs)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_layers(model: Any) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = compiled(layer)
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return Wrapper(Wrapper(model))


def compiled_and_wrapped(model: nn.Module) -> nn.Module:
    return Wrapper(compiled(model))


def frozen_layers(model: nn.Module) -> nn.Module:
    for name, param in model.named_parameters():
        param.requires_grad_("layers" not in name)
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


#: DeepSpeed can't train compiled modules under stage 3.
WRAPPED = [
    (1, compiled),
    (1, compiled_and_wrapped),
    (2, compiled_layers),
    (2, wrapped),
    (3, wrapped),
]


def save_llama(kinds: list[tuple[int, Callable[[Any], nn.Module]]], directory: str, config: dict[str, Any]) -> None:
    """A step at rate 0 of a wrapped model per kind, and its checkpoint; frozen parameters are left out."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    for stage, wrap in kinds:
        torch.manual_seed(5)
        engine, *_ = deepspeed.initialize(
            model=wrap(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
                "zero_optimization": {"stage": stage},
                "steps_per_print": 10**9,
            },
        )
        ids = torch.tensor([IDS])
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        place = f"{directory}/{wrap.__name__}{stage}"
        engine.save_checkpoint(place, exclude_frozen_parameters=True)
        (Path(place) / "config.json").write_text(json.dumps(config))
        engine.destroy()


def own(directory: Path, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    """What is exported, once transformers has found everything in it."""
    from transformers import AutoModelForCausalLM

    checkpoint_files.run(directory, tmp_path, format="hf", **options)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    return checkpoint_files.load_tensors(tmp_path)


@pytest.fixture(scope="module")
def llamas(workers: Callable[[int], Workers], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llamas")
    kinds = [*WRAPPED, *((stage, frozen_layers) for stage in (1, 2, 3)), (1, plain)]
    workers(1).run(save_llama, kinds, str(directory), LLAMA)
    return directory


def test_what_wrappers_put_before_names_is_taken_off(llamas: Path, tmp_path: Path) -> None:
    expected = own(llamas / "plain1", tmp_path / "plain")
    for stage, wrap in WRAPPED:
        saved = llamas / f"{wrap.__name__}{stage}"
        found = own(saved, tmp_path / saved.name)
        assert {name: torch.equal(tensor, expected[name]) for name, tensor in found.items()} == dict.fromkeys(
            expected, True
        )


def test_a_wrapped_models_checkpoint_is_widened_by_its_config(llamas: Path, tmp_path: Path) -> None:
    """Under its own names and, on the way through a universal one, to the model's; no draw depends on a name here."""
    wide = {"intermediate_size": 48}
    options: dict[str, Any] = {"config": str(llamas / "plain1/config.json")}
    expected = own(llamas / "plain1", tmp_path / "plain", widths=wide, **options)
    for stage, wrap in WRAPPED:
        saved = llamas / f"{wrap.__name__}{stage}"
        checkpoint_files.run(saved, tmp_path / f"{saved.name}.zero", wide, **options)
        names = open_checkpoint(tmp_path / f"{saved.name}.zero/global_step1").layout.params.keys()
        assert names == open_checkpoint(saved / "global_step1").layout.params.keys()
        checkpoint_files.run(saved, tmp_path / f"{saved.name}.universal", wide, format="universal", **options)
        found = own(tmp_path / f"{saved.name}.universal", tmp_path / saved.name, **options)
        assert {name: torch.equal(tensor, expected[name]) for name, tensor in found.items()} == dict.fromkeys(
            expected, True
        )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("universal", [False, True])
def test_a_checkpoint_without_its_frozen_base_is_neither_exported_nor_widened(
    stage: int, universal: bool, llamas: Path, tmp_path: Path
) -> None:
    saved = llamas / f"frozen_layers{stage}"
    options: dict[str, Any] = {"config": str(llamas / "plain1/config.json")}
    if universal:
        checkpoint_files.run(saved, tmp_path / "universal", format="universal")
        saved = tmp_path / "universal"
    lacking = r"lacks model\.layers\.0\..* and 13 more.*exclude_frozen_parameters"
    with pytest.raises(
        CheckpointError, match=f"doesn't hold the model of the config, a LlamaForCausalLM: it {lacking}"
    ):
        checkpoint_files.run(saved, tmp_path / "out", format="hf", **options)
    for format in ("zero", "hf"):
        with pytest.raises(CheckpointError, match=lacking):
            checkpoint_files.run(saved, tmp_path / "out", {"hidden_size": 32}, format=format, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, r"it lacks model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"the model has no model\.layers\.1\."),
        (
            {"intermediate_size": 32},
            r"other shapes of model\.layers\.0\.mlp\.\w+\.weight \(\(.*24.*\), not \(.*32.*\)\)",
        ),
        ({"attention_bias": True}, r"it lacks model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ({"tie_word_embeddings": True}, r"model\.embed_tokens\.weight and lm_head\.weight apart.*tie_word_embeddings"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            r"it lacks score\.\w+.*; the model has no lm_head\.weight",
        ),
    ],
)
def test_what_isnt_the_configs_model_is_refused_by_name(
    change: dict[str, Any], words: str, llamas: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LLAMA, **change}))
    with pytest.raises(CheckpointError, match=words):
        checkpoint_files.run(llamas / "plain1", tmp_path / "out", format="hf", config=str(config))
    assert not (tmp_path / "out").exists()


def test_without_the_configs_model_it_is_said_that_nobody_compared(
    llamas: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LLAMA, "model_type": "my_own"}))
    checkpoint_files.run(llamas / "compiled_and_wrapped1", tmp_path / "out", format="hf", config=str(config))
    assert "can't be held against the model's config" in caplog.text
    assert "my_own" in caplog.text
    found = checkpoint_files.load_tensors(tmp_path / "out")
    assert {name.split(".")[0] for name in found} == {"model", "lm_head"}


def test_names_that_transformers_changes_on_loading_will_do() -> None:
    """Experts that are modules, as earlier versions had them, and buffers, which belong to a checkpoint as well."""
    model = HuggingFaceModel.of(QWEN)
    assert model is not None
    experts = {
        f"{name.rpartition('.')[0]}.{expert}.{leaf}.weight": (8, 16) if leaf != "down_proj" else (16, 8)
        for name in model.shapes
        if name.endswith("experts.gate_up_proj")
        for expert in range(4)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    older = {name: shape for name, shape in model.shapes.items() if ".experts." not in name} | experts
    model.check(older, "somewhere")
    with pytest.raises(CheckpointError, match=r"somewhere .* lacks model\.layers\.\d\.mlp\.experts\.gate_up_proj"):
        model.check({name: shape for name, shape in older.items() if ".1.mlp.experts.2.up" not in name}, "somewhere")


def test_a_missing_buffer_is_missed() -> None:
    config = {"model_type": "deepseek_v3", **{key: value for key, value in LLAMA.items() if key not in OF_LLAMA}}
    model = HuggingFaceModel.of(
        {**config, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    )
    assert model is not None
    model.check(model.shapes, "somewhere")
    buffer = next(name for name in model.shapes if name.endswith("e_score_correction_bias"))
    with pytest.raises(CheckpointError, match=f"lacks {buffer}"):
        model.check({name: shape for name, shape in model.shapes.items() if name != buffer}, "somewhere")


OF_LLAMA = ("model_type", "architectures", "head_dim")
