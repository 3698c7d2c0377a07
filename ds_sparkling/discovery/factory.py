"""Factories build a model from its widths: a function of the user's, or a Hugging Face config alone."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.config import read_json

#: The first version of transformers that stacks experts as DeepSpeed 0.19.8's AutoEP expects, and the first that
#: AutoEP can't take any more; the extra ``hf`` in pyproject.toml has the same range.
TRANSFORMERS = ((5, 9), (5, 23))


#: What configs of the library call the number of layers, and what some call it besides.
LAYERS, _LAYERS_TOO = "num_hidden_layers", ("num_layers",)


@dataclass(frozen=True)
class HuggingFaceFactory:
    """Builds a causal language model of the transformers library from its config, whatever widths are asked for.

    Where the config leaves ``head_dim`` to be the hidden size over the heads, it stays what it is at the config's own
    widths: heads keep their size when the hidden size grows. Lists in the config that have one entry per layer, as
    ``layer_types`` has, are repeated when the number of layers grows.

    Attributes:
        config: the contents of a ``config.json``.
    """

    config: Mapping[str, Any]

    def __call__(self, **widths: int) -> Any:
        transformers = import_transformers()
        settings = transformers.AutoConfig.for_model(
            **{**self.config, **self.head_size, **self._layer_lists(widths), **widths}
        )
        return transformers.AutoModelForCausalLM.from_config(settings)

    @cached_property
    def head_size(self) -> dict[str, int]:
        """``head_dim``, if the config leaves it to follow from other widths and its architecture lets it be set."""
        if self.config.get("head_dim") is not None:
            return {}
        settings = import_transformers().AutoConfig.for_model(**self.config)
        hidden, heads = (getattr(settings, name, None) for name in ("hidden_size", "num_attention_heads"))
        derived = isinstance(getattr(type(settings), "head_dim", None), property)
        if derived or not isinstance(hidden, int) or not isinstance(heads, int):
            return {}
        # A config that sets head_dim to anything else means something else by it (DeepSeek's is that of RoPE alone).
        return {"head_dim": hidden // heads} if getattr(settings, "head_dim", None) in (None, hidden // heads) else {}

    def widened(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """The config of the model at other widths."""
        if not widths:
            return dict(self.config)
        own = {own_name(self.config, axis): width for axis, width in widths.items()}
        aliases = {axis for axis in widths if axis not in own}  # which would take precedence
        kept = {key: value for key, value in self.config.items() if key not in aliases}
        return {**kept, **self.head_size, **self._layer_lists(widths), **own}

    def _layer_lists(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """The config's lists of one entry per layer, at another number of layers."""
        found: dict[str, Any] = {}
        for axis, count in widths.items():
            own = own_name(self.config, axis)
            if own in {own_name(self.config, LAYERS), *_LAYERS_TOO}:
                total = getattr(import_transformers().AutoConfig.for_model(**self.config), own)
                for key, value in self.config.items():
                    if isinstance(value, list) and len(value) == total:
                        found[key] = [value[layer % total] for layer in range(count)]
        return found


def own_name(config: Mapping[str, Any], name: str) -> str:
    """What an architecture itself calls an attribute: GPT-2's ``hidden_size`` is ``n_embd``."""
    names = import_transformers().AutoConfig.for_model(config["model_type"]).attribute_map
    return str(names.get(name, name))


def import_transformers() -> Any:
    """Import the transformers library.

    Returns:
        The module.

    Raises:
        ConfigError: if it isn't installed, or in a version that AutoEP of this DeepSpeed doesn't work with.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("Hugging Face configs need transformers: pip install 'ds-sparkling[hf]'") from None
    first, beyond = TRANSFORMERS
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not first <= version < beyond:
        wanted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, beyond))}"
        raise ConfigError(
            f"transformers {transformers.__version__} isn't one that DeepSpeed's AutoEP works with; "
            f"pip install 'transformers{wanted}'"
        )
    return transformers


def named_factory(name: str) -> BuildModel:
    """Find what ``module:function`` names, in the working directory or installed.

    Args:
        name: ``module:function``.

    Returns:
        The function.

    Raises:
        ConfigError: if there is no such thing, or it can't be called.
    """
    if os.getcwd() not in sys.path:  # installed commands don't have it there
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{name} can't be called")
    factory: BuildModel = found
    return factory


def named_inputs(name: str) -> Any:
    """Call the function that ``module:function`` names, which gives inputs to try a model with.

    Args:
        name: ``module:function``.

    Returns:
        What the function gives.

    Raises:
        ConfigError: if there is no such function, or it fails.
    """
    function = named_factory(name)
    try:
        return function()
    except Exception as error:
        raise ConfigError(f"{name} is to give inputs and failed: {type(error).__name__}: {error}") from error


def find_factory(reference: str) -> BuildModel:
    """The model factory that a command line names: ``module:function``, or the path of a ``config.json``.

    Args:
        reference: what the command line has.

    Returns:
        A function that builds the model from its widths.

    Raises:
        ConfigError: if it is neither.
    """
    if ":" in reference and not os.path.exists(reference):
        return named_factory(reference)
    data = read_json(reference)
    if "model_type" not in data:
        raise ConfigError(f"{reference} isn't a Hugging Face config: it has no 'model_type'")
    return HuggingFaceFactory(data)
