"""Refuse what neither :func:`~ds_sparkling.initialize` nor :func:`~ds_sparkling.adopt` takes, at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_sparkling.discovery.build import BuildModel, require_factory
from ds_sparkling.engine.extension_locks import warn_of_left_locks
from ds_sparkling.engine.internals import check_version
from ds_sparkling.engine.parallelism import refuse_parallelism
from ds_sparkling.errors import ConfigError
from ds_sparkling.spec.config import SparklingConfig, read_json, sparkling_config
from ds_sparkling.spec.unsupported import refuse_unsupported


def accepted(
    build_model: BuildModel,
    config: str | Mapping[str, Any],
    factories: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], SparklingConfig]:
    """The DeepSpeed config and its ``"sparkling"`` block, if a run of them can grow.

    Args:
        build_model: makes the model.
        config: the DeepSpeed config, a path or a mapping.
        factories: by name, what a growth has to make anew.
        arguments: further ones of ``deepspeed.initialize``, if that is still to be called.

    Raises:
        ConfigError, UnsupportedError: for what can't grow; names it, and the way out.
    """
    check_version()
    warn_of_left_locks()  # DeepSpeed may load an op from now on
    require_factory(build_model)
    _check_factories(factories)
    refuse_parallelism(arguments)
    ds_config = read_json(config)
    block = sparkling_config(ds_config)
    refuse_unsupported(ds_config)
    return ds_config, block


def _check_factories(factories: Mapping[str, Any]) -> None:
    """Raise ConfigError for what a growth has to make anew and that isn't a function."""
    for name, made in factories.items():
        if made is not None and (not callable(made) or isinstance(made, nn.Module)):
            raise ConfigError(
                f"{name} must be a function, because a growth has to make it anew; got a {type(made).__name__}: "
                f"pass {name}=lambda ...: ..."
            )
