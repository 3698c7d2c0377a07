"""Parallelism besides that of data and experts, refused by name however it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

from ds_sparkling.engine.internals import sequence_parallel_ranks, tensor_parallel_ranks
from ds_sparkling.errors import UnsupportedError


def refuse_parallelism(arguments: Mapping[str, Any] | None = None) -> None:
    """Raise UnsupportedError for parallelism besides that of data and experts, however it comes in.

    Args:
        arguments: of ``deepspeed.initialize``; without, what has been made in this process so far.
    """
    given = arguments or {}
    if given.get("mpu") is not None:
        raise UnsupportedError("mpu: model parallelism beyond expert parallelism can't be combined with growth yet")
    mesh = given.get("mesh_param") or ()
    if any(size > 1 for size in mesh[1:]):
        raise UnsupportedError(
            f"mesh_param = {tuple(mesh)!r}: sequence parallelism can't be combined with growth yet; leave it out"
        )
    made = _made()
    if made:
        raise UnsupportedError(
            f"{made}: sequence, tensor and model parallelism can't be combined with growth yet; leave it out"
        )


def refuse_engine(engine: DeepSpeedEngine) -> None:
    """Raise UnsupportedError for an engine of another kind, or that is parallel in another way, than can be grown."""
    if type(engine) is not DeepSpeedEngine:
        raise UnsupportedError(f"a {type(engine).__name__} can't be grown yet; only DeepSpeed's plain engine can")
    parallelism = _parallelism_of(engine)
    if parallelism:
        raise UnsupportedError(f"the engine has {parallelism}, which can't be combined with growth yet")


def _made() -> str:
    """What has been made in this process for parallelism besides that of data and experts; empty if nothing has."""
    sizes: dict[str, Any] = {}
    mesh = groups.mesh_device
    for dimension in (mesh.mesh_dim_names or ()) if mesh is not None else ():
        if dimension != "data_parallel":
            sizes[f"deepspeed.utils.groups.mesh_device, dimension {dimension!r}"] = mesh[dimension].size()
    for kind in ("sequence", "model"):
        size = getattr(groups.mpu, f"get_{kind}_parallel_world_size", None)
        sizes[f"deepspeed.utils.groups.mpu, {kind} parallelism"] = size() if size is not None else 1
    sizes["DeepSpeed's initialize_sequence_parallel"] = sequence_parallel_ranks()
    sizes["deepspeed.tp_model_init, tensor parallelism"] = tensor_parallel_ranks()
    return next((f"{what} of {size} ranks" for what, size in sizes.items() if size > 1), "")


def _parallelism_of(engine: DeepSpeedEngine) -> str:
    """What ``engine`` spreads over ranks besides data and experts; empty if nothing."""
    sizes = {
        "sequence": engine.sequence_parallel_size,
        "tensor": engine.autotp_size(),
        "model": engine.mp_world_size,
    }
    return next((f"{kind} parallelism over {size} ranks" for kind, size in sizes.items() if size > 1), "")
