"""Read private parts of DeepSpeed and torch, beside the optimizers': in one place, checked by version.

What is replaced there is in :mod:`ds_sparkling.engine.hooks`, and the optimizers' own are in
:mod:`ds_sparkling.engine.optimizers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.tensor_parallel import init_utils as tensor_parallel
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from ds_sparkling.errors import UnsupportedError

#: DeepSpeed versions whose internals this package was checked against.
CHECKED_VERSIONS = ("0.19.8",)

#: What counts, or goes on, in an engine from step to step.
COUNTERS = (
    "global_steps",
    "global_samples",
    "micro_steps",
    "skipped_steps",
    "_unmanaged_backward_count",
    "_is_gradient_accumulation_boundary",
    "_step_applied",
    "_global_grad_norm",
    "warn_unscaled_loss",
    "enable_backward_allreduce",
    "loaded_checkpoint_mp_world_size",
    "loaded_checkpoint_dp_world_size",
    "training_dataloader",
    "tput_timer",
    "torch_autocast_z0_gradscaler",
)

#: What DeepSpeed writes into a checkpoint's model states, from where ``load_checkpoint`` returns nearly all of it as
#: the client's state, too.
_MODEL_STATES = {
    "buffer_names",
    "checkpoint_parallel_dimensions",
    "data_sampler",
    "dp_world_size",
    "ds_autoep_layers",
    "ds_config",
    "ds_version",
    "frozen_param_fragments",
    "frozen_param_shapes",
    "global_samples",
    "global_steps",
    "lr_scheduler",
    "module",
    "mp_world_size",
    "num_experts",
    "optimizer",
    "param_shapes",
    "random_ltd",
    "shared_params",
    "skipped_steps",
    "universal_checkpoint_info",
}


def check_version() -> None:
    """Raise UnsupportedError on a DeepSpeed whose internals weren't checked."""
    if deepspeed.__version__.split("+")[0] not in CHECKED_VERSIONS:
        raise UnsupportedError(
            f"DeepSpeed {deepspeed.__version__} wasn't checked; growing reaches into its internals, which are known "
            f"for {', '.join(CHECKED_VERSIONS)}: pip install deepspeed=={CHECKED_VERSIONS[-1]}"
        )


def clients_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a client state, as ``load_checkpoint`` returned it, isn't DeepSpeed's."""
    return {key: value for key, value in state.items() if key not in _MODEL_STATES}


def own_files(engine: DeepSpeedEngine, directory: str, tag: str, *, module_only: bool) -> list[Path]:
    """The files that ``engine.load_checkpoint`` is going to read on this rank and on no other.

    Not of universal checkpoints, and without the files of single experts.

    Args:
        engine: about to load.
        directory, tag: of the checkpoint.
        module_only: whether the optimizer's state isn't loaded.
    """
    found = [Path(engine._get_ckpt_name(directory, tag))]
    sharded_experts = engine.has_moe_layers and engine.zero_optimization_partition_weights()
    if engine.zero_optimization() and not engine.zero_nvme_offload_optimizer() and (sharded_experts or not module_only):
        own = Path(engine._get_zero_ckpt_name(directory, tag))
        former = own.with_name(own.name.replace("_optim_states.pt", "optim_states.pt"))
        found.append(former if former.exists() and not own.exists() else own)
    return found


def boundary_by_hand(engine: DeepSpeedEngine) -> bool | None:
    """What ``engine.set_gradient_accumulation_boundary`` was last given; None if it is the engine that counts."""
    boundary: bool | None = engine._is_gradient_accumulation_boundary
    return boundary


def unmanaged_backwards(engine: DeepSpeedEngine) -> int:
    """Backward passes since the last optimizer step, where a script has taken gradient accumulation over."""
    return int(engine._unmanaged_backward_count)


def data_parallel_group() -> Any:
    """The group that an engine made now would partition over."""
    return groups._get_data_parallel_group()


def sequence_parallel_ranks() -> int:
    """Over how many ranks DeepSpeed's ``initialize_sequence_parallel`` has spread sequences in this process."""
    made = parallel_state_sp._SEQUENCE_PARALLEL_GROUP is not None
    return int(parallel_state_sp.get_sequence_parallel_world_size()) if made else 1


def tensor_parallel_ranks() -> int:
    """Over how many ranks ``deepspeed.tp_model_init`` has spread tensors in this process."""
    recorded: Mapping[str, Any] | None = tensor_parallel._TP_MODEL_INIT_ARGS
    return 1 if recorded is None else int(recorded["tp_size"])


def default_store() -> Any:
    """The store that this process's default process group was made with."""
    return distributed_c10d._get_default_store()


def abort_collectives() -> None:
    """End what this process waits for on its devices; the default process group is gone then."""
    distributed_c10d._abort_process_group()
