"""Models that talk to other ranks while they are built or run, and parallelism that growth can't be combined with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import Workers
from ds_sparkling.check.growth_report import check_growth
from ds_sparkling.errors import SparklingError, UnsupportedError

Pool = Callable[[int], Workers]

VOCABULARY = 11
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "steps_per_print": 10**9,
    "sparkling": {"stages": [{"at_step": 0, "widths": {"inner": 16}}], "checkpoint_before_growth": False},
}


class Talker(nn.Module):
    """Adds to what each rank has what all of them have, on average."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.up_proj = nn.Linear(8, inner, bias=False)
        self.down_proj = nn.Linear(inner, 8, bias=False)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        inner = torch.nn.functional.silu(self.up_proj(self.embed(input_ids)))
        everyone = [torch.empty_like(inner) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, inner)
        logits: Tensor = self.head(self.down_proj(inner + torch.stack(everyone).mean(0)))
        return logits


def talking(inner: int = 8) -> nn.Module:
    torch.manual_seed(7)
    torch.distributed.barrier()
    sizes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, inner)
    assert sizes == [inner] * len(sizes)
    return Talker(inner)


def grouping(inner: int = 8) -> nn.Module:
    torch.distributed.new_group([0, 1])
    return Talker(inner)


def piped(inner: int = 8) -> nn.Module:
    from deepspeed.pipe import LayerSpec, PipelineModule

    made: nn.Module = PipelineModule([LayerSpec(nn.Linear, 8, inner), LayerSpec(nn.Linear, inner, 8)], num_stages=1)
    return made


def cut(inner: int = 8) -> nn.Module:
    import deepspeed

    made: nn.Module = deepspeed.tp_model_init(Talker(inner), tp_size=2, dtype=torch.float32)
    return made


def partitioned(inner: int = 8) -> nn.Module:
    import deepspeed

    with deepspeed.zero.Init():
        return Talker(inner)


def spread(inner: int = 8) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(Talker(inner), mesh, {"up_proj": ColwiseParallel()})


@contextmanager
def nothing() -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def mesh_asked_for() -> Iterator[dict[str, Any]]:
    yield {"mesh_param": (1, 2)}


@contextmanager
def mesh_made() -> Iterator[dict[str, Any]]:
    import deepspeed
    from deepspeed.utils import groups

    groups.mesh_device = deepspeed.comm.initialize_mesh_device((1, 2), ("data_parallel", "sequence_parallel"))
    try:
        yield {}
    finally:
        groups.mesh_device = None


@contextmanager
def unit_given() -> Iterator[dict[str, Any]]:
    yield {"mpu": SimpleNamespace(get_model_parallel_world_size=lambda: 2)}


@contextmanager
def sequence_groups_made() -> Iterator[dict[str, Any]]:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(2)
    try:
        yield {}
    finally:
        parallel_state_sp._release_sequence_parallel_groups()


def outcome(build_model: Callable[..., nn.Module], around: Callable[[], Any]) -> str | tuple[float, float]:
    """What ``initialize`` says, or the mean of the logits before and after a growth."""
    import ds_sparkling

    try:
        with around() as arguments:
            engine = ds_sparkling.initialize(build_model, CONFIG, **arguments)
    except SparklingError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        _forget_tensor_parallelism()
    ids = torch.arange(VOCABULARY)[None] + torch.distributed.get_rank()
    before = float(engine(ids % VOCABULARY).detach().mean())
    engine = ds_sparkling.grow_if_due(engine)
    return before, float(engine(ids % VOCABULARY).detach().mean())


def _forget_tensor_parallelism() -> None:
    """DeepSpeed would cut the models of all engines to come."""
    from deepspeed.module_inject import layers
    from deepspeed.runtime.tensor_parallel import init_utils

    init_utils._TP_MODEL_INIT_ARGS = None
    layers.set_autotp_mode(training=False)


def test_a_model_that_talks_to_others_is_tried_on_one_rank_and_grows_on_all(workers: Pool) -> None:
    for answer in workers(2).run(outcome, talking, nothing):
        assert not isinstance(answer, str), answer
        assert answer[0] == pytest.approx(answer[1], rel=1e-6)


REFUSED = {
    "new_group": (grouping, nothing, "UnsupportedError.*torch.distributed.new_group in grouping .*close over them"),
    "pipeline": (piped, nothing, "UnsupportedError.*PipelineModule; pipeline parallelism"),
    "tp_model_init": (cut, nothing, "UnsupportedError.*deepspeed.tp_model_init, tensor parallelism of 2 ranks"),
    "zero.Init": (partitioned, nothing, "UnsupportedError.*embed.weight by deepspeed.zero.Init: leave that out"),
    "DTensor": (spread, nothing, "UnsupportedError.*up_proj.weight a DTensor; tensor parallelism"),
    "mesh_param": (talking, mesh_asked_for, r"UnsupportedError.*mesh_param = \(1, 2\): sequence parallelism"),
    "mesh_device": (talking, mesh_made, "UnsupportedError.*mesh_device, dimension 'sequence_parallel' of 2 ranks"),
    "mpu": (talking, unit_given, "UnsupportedError.*mpu: model parallelism"),
    "sequence groups": (talking, sequence_groups_made, "UnsupportedError.*initialize_sequence_parallel of 2 ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_parallelism_is_refused_on_all_ranks_however_it_comes_in(case: str, workers: Pool) -> None:
    import re

    build_model, around, message = REFUSED[case]
    for answer in workers(2).run(outcome, build_model, around):
        assert isinstance(answer, str), answer
        assert re.search(message, answer), answer
    if case == "zero.Init":
        workers(2).stop()  # on the first rank alone, which tried it, DeepSpeed has given numbers to its parameters


def test_a_pipeline_is_refused_without_any_process_group() -> None:
    with pytest.raises(UnsupportedError, match="PipelineModule; pipeline parallelism"):
        check_growth(piped, {"inner": 8}, {"inner": 16})


def adopted(kind: str) -> str:
    """What ``adopt`` says of an engine that looks like one of another kind, or parallel in another way."""
    import deepspeed
    from deepspeed.runtime.pipe.engine import PipelineEngine

    import ds_sparkling

    engine: Any
    if kind == "PipelineEngine":
        engine = PipelineEngine.__new__(PipelineEngine)
        nn.Module.__init__(engine)
    else:
        engine, *_ = deepspeed.initialize(model=Talker(8), config=CONFIG)
        engine.sequence_parallel_size = 2
    try:
        ds_sparkling.adopt(engine, talking)
    except UnsupportedError as error:
        return str(error)
    return "adopted"


def test_engines_of_another_kind_are_not_adopted(workers: Pool) -> None:
    assert all("a PipelineEngine can't be grown" in answer for answer in workers(2).run(adopted, "PipelineEngine"))
    assert all("sequence parallelism over 2 ranks" in answer for answer in workers(2).run(adopted, "sequences"))


class SplitAttention(nn.Module):
    """A language model whose attention is Ulysses': each rank has all heads of a part of the sequence."""

    def __init__(self, inner: int) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(16, 8, bias=False)
        self.up_proj = nn.Linear(8, inner, bias=False)
        self.down_proj = nn.Linear(inner, 8, bias=False)
        self.attention = DistributedAttention(Attention(), torch.distributed.group.WORLD, scatter_idx=2, gather_idx=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_BTH = self.embed(input_ids)
        queries, keys, values = (linear(hidden_BTH).unflatten(-1, (4, 4)) for linear in self.qkv)
        hidden_BTH = hidden_BTH + self.out_proj(self.attention(queries, keys, values, 0).flatten(-2))
        logits: Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(hidden_BTH)))
        return logits


class Attention(nn.Module):
    def forward(self, *qkv_BTND: Any) -> Tensor:
        queries, keys, values = (tensor.transpose(1, 2) for tensor in qkv_BTND[:3])
        assert queries.shape[1:3] == (2, 32)  # half of the heads, and twice the 16 tokens
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def proven_on_the_first_rank() -> Any:
    """What a proof says of growing :class:`SplitAttention`, while the other rank does nothing."""
    from ds_sparkling.discovery.proof import prove_function
    from ds_sparkling.discovery.reading import probe

    if torch.distributed.get_rank() > 0:
        return None
    return prove_function(SplitAttention, probe(SplitAttention, {"inner": 8}), {"inner": 8}, {"inner": 16})


def test_sequence_parallel_attention_is_tried_on_one_rank(workers: Pool) -> None:
    proof, _ = workers(2).run(proven_on_the_first_rank)
    assert proof, proof
    assert proof.difference < 1e-9


def gradients_on_the_first_rank() -> bool | None:
    """Whether a gradient gets through :class:`SplitAttention`'s exchanges, while the other rank does nothing."""
    from ds_sparkling.discovery.forward import leads_to_outputs, run, token_calls

    if torch.distributed.get_rank() > 0:
        return None
    model = SplitAttention(8)
    call = next(token_calls(model, 0))
    return leads_to_outputs(model, call, run(model, call).tensors.keys(), list(model.qkv.parameters()))


def test_gradients_of_a_trial_need_no_other_rank(workers: Pool) -> None:
    assert workers(2).run(gradients_on_the_first_rank) == [True, None]
