"""What builds a model: a named function, or a Hugging Face config with its size of heads held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_sparkling.discovery.factory import (
    HuggingFaceFactory,
    find_factory,
    import_transformers,
    named_factory,
    own_name,
)
from ds_sparkling.errors import ConfigError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(factory: HuggingFaceFactory, **widths: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = factory(**widths)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def test_heads_keep_their_size_when_the_hidden_width_grows() -> None:
    wide = shapes(HuggingFaceFactory(LLAMA), hidden_size=32)
    assert wide["model.layers.0.self_attn.q_proj.weight"] == (16, 32)
    given = shapes(HuggingFaceFactory({**LLAMA, "head_dim": 6}), hidden_size=32)
    assert given["model.layers.0.self_attn.q_proj.weight"] == (24, 32)


def test_a_head_dim_that_means_something_else_is_left_alone() -> None:
    deepseek = {"model_type": "deepseek_v3", "hidden_size": 64, "num_attention_heads": 2, "qk_rope_head_dim": 4}
    assert HuggingFaceFactory(deepseek).head_size == {}
    assert HuggingFaceFactory({"model_type": "falcon"}).head_size == {}  # follows whatever happens


def test_the_widened_config_makes_the_model_that_the_factory_makes() -> None:
    factory = HuggingFaceFactory(LLAMA)
    wide = factory.widened({"hidden_size": 32})
    assert wide == {**LLAMA, "hidden_size": 32, "head_dim": 4}
    assert shapes(HuggingFaceFactory(wide)) == shapes(factory, hidden_size=32)
    assert factory.widened({}) == LLAMA
    assert own_name({"model_type": "gpt2"}, "hidden_size") == "n_embd"
    assert (
        HuggingFaceFactory({"model_type": "gpt2", "n_embd": 8, "n_head": 2}).widened({"hidden_size": 16})["n_embd"]
        == 16
    )


@pytest.mark.parametrize("version", ["5.8.1", "5.23.0", "6.0.0.dev0", "4.57"])
def test_a_transformers_that_autoep_does_not_work_with_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ConfigError, match=rf"transformers {version} isn't one.*pip install 'transformers>=5.9,<5.23'"):
        import_transformers()
    monkeypatch.setattr(transformers, "__version__", "5.22.2")
    assert import_transformers() is transformers


def test_the_range_is_the_packages() -> None:
    metadata = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"transformers>=5.9,<5.23"' in metadata


def test_references_of_a_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    assert find_factory(str(config)) == HuggingFaceFactory(LLAMA)
    assert find_factory("torch.nn:Linear") is torch.nn.Linear
    config.write_text("{}")
    for reference, message in (
        (str(config), "has no 'model_type'"),
        (str(tmp_path / "absent.json"), "doesn't exist"),
        ("no_such_module:function", "no_such_module"),
        ("torch.nn:NoSuch", "NoSuch"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_factory(reference)
    with pytest.raises(ConfigError, match="can't be called"):
        named_factory("torch:__version__")
