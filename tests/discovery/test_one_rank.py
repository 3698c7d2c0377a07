"""Collectives of a model that is tried on one rank alone: answered as if all ranks were alike, or refused by name."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

from distributed import Workers
from ds_sparkling.discovery.build import build_on_meta
from ds_sparkling.discovery.forward import run, token_calls
from ds_sparkling.discovery.one_rank import group_of, without_peers
from ds_sparkling.errors import PlanError, UnsupportedError

Pool = Callable[[int], Workers]


@pytest.fixture(scope="module", autouse=True)
def alone_in_the_world() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()
    gc.collect()


# -- the answers are those of ranks that all hold the same ------------------------------------------------------


def reduced(op: Any, given: Tensor, group: Any) -> list[Tensor]:
    work = dist.all_reduce(given, op=op, group=group, async_op=True)
    work.wait()
    assert work.is_completed()
    return [given]


def reduced_onto(root: int, given: Tensor, group: Any) -> list[Tensor]:
    dist.reduce(given, group=group, group_dst=root)
    return [given] if group.rank() == root else []


def sent_by(root: int, given: Tensor, group: Any) -> list[Tensor]:
    dist.broadcast(given, group=group, group_src=root)
    return [given]


def gathered(given: Tensor, group: Any) -> list[Tensor]:
    found = [torch.empty_like(given) for _ in range(group.size())]
    dist.all_gather(found, given, group=group)
    return found


def gathered_end_to_end(given: Tensor, group: Any) -> list[Tensor]:
    found = given.new_empty(group.size() * given.shape[0], *given.shape[1:])
    dist.all_gather_into_tensor(found, given, group=group)
    return [found]


def gathered_onto(root: int, given: Tensor, group: Any) -> list[Tensor]:
    found = [torch.empty_like(given) for _ in range(group.size())] if group.rank() == root else None
    dist.gather(given, found, group=group, group_dst=root)
    return found or []


def shared_out(given: Tensor, group: Any) -> list[Tensor]:
    found = given.new_empty(given.shape[0] // group.size(), *given.shape[1:])
    dist.reduce_scatter_tensor(found, given, group=group)
    return [found]


def shared_out_in_pieces(given: Tensor, group: Any) -> list[Tensor]:
    pieces = list(given.chunk(group.size()))
    found = torch.empty_like(pieces[0])
    dist.reduce_scatter(found, pieces, group=group)
    return [found]


def exchanged(given: Tensor, group: Any) -> list[Tensor]:
    found = torch.empty_like(given)
    dist.all_to_all_single(found, given, group=group)
    return [found]


def exchanged_unevenly(given: Tensor, group: Any) -> list[Tensor]:
    sent = [given.shape[0] - group.size() + 1] + [1] * (group.size() - 1)
    kept = sent[group.rank()]
    found = given.new_empty(kept * group.size(), *given.shape[1:])
    dist.all_to_all_single(found, given, [kept] * group.size(), sent, group=group)
    return [found]


def coalesced(given: Tensor, group: Any) -> list[Tensor]:
    again = given.clone()
    with dist.distributed_c10d._coalescing_manager(group=group, async_ops=True) as pending:
        dist.all_reduce(given, group=group)
        dist.all_reduce(again, group=group)
    pending.wait()
    return [given, again]


def objects(given: Tensor, group: Any) -> list[Tensor]:
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, {"given": given}, group=group)
    return [entry["given"] for entry in found]


def after_a_barrier(given: Tensor, group: Any) -> list[Tensor]:
    dist.barrier(group=group)
    return [given]


def functionally(collective: Callable[..., Tensor], *arguments: Any) -> Callable[[Tensor, Any], list[Tensor]]:
    return lambda given, group: [collective(given, *arguments, group) * 1]


ALIKE: dict[str, Callable[[Tensor, Any], list[Tensor]]] = {
    "sum": partial(reduced, dist.ReduceOp.SUM),
    "product": partial(reduced, dist.ReduceOp.PRODUCT),
    "max": partial(reduced, dist.ReduceOp.MAX),
    "reduce": partial(reduced_onto, 1),
    "broadcast": partial(sent_by, 0),
    "all_gather": gathered,
    "all_gather_into_tensor": gathered_end_to_end,
    "gather": partial(gathered_onto, 1),
    "reduce_scatter_tensor": shared_out,
    "reduce_scatter": shared_out_in_pieces,
    "all_to_all_single": exchanged,
    "uneven": exchanged_unevenly,
    "coalesced": coalesced,
    "objects": objects,
    "barrier": after_a_barrier,
    "functional sum": functionally(functional.all_reduce, "sum"),
    "functional all_gather": functionally(functional.all_gather_tensor, 0),
    "functional reduce_scatter": functionally(functional.reduce_scatter_tensor, "sum", 0),
    "functional all_to_all": functionally(functional.all_to_all_single, None, None),
    "functional uneven": lambda given, group: [
        functional.all_to_all_single(given, [[3, 1][group.rank()]] * 2, [3, 1], group) * 1
    ],
    "functional broadcast": functionally(functional.broadcast, 0),
}


def for_real_and_alone() -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What comes out of every collective of two ranks that hold the same, and of one alone."""
    given, group = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-5.0, 6.0], [7.0, 0.5]]), dist.group.WORLD
    found = {}
    for name, collective in ALIKE.items():
        real = collective(given.clone(), group)
        with without_peers():
            alone = collective(given.clone(), group)
            with torch.device("meta"):
                shapes = [tuple(tensor.shape) for tensor in collective(given.to("meta"), group)]
        assert shapes == [tuple(tensor.shape) for tensor in real], name
        found[name] = real, alone
    return found


def test_one_rank_answers_as_two_that_hold_the_same(workers: Pool) -> None:
    for answers in workers(2).run(for_real_and_alone):
        for name, (real, alone) in answers.items():
            assert all(map(torch.equal, real, alone)), name


def test_any_number_of_ranks_can_be_stood_in_for() -> None:
    given = torch.arange(8.0)
    with without_peers(), group_of(4) as group:
        assert reduced(dist.ReduceOp.SUM, given.clone(), group)[0].equal(given * 4)
        assert reduced(dist.ReduceOp.AVG, given.clone(), group)[0].equal(given)
        assert gathered_end_to_end(given, group)[0].equal(given.repeat(4))
        assert exchanged(given, group)[0].equal(given[:2].repeat(4))
        pieces = [torch.empty(2) for _ in range(4)]
        dist.all_to_all(pieces, list(given.chunk(4)), group=group)
        assert all(piece.equal(given[:2]) for piece in pieces)
        share = torch.empty(2)
        dist.scatter(share, list(given.chunk(4)), group=group, group_src=0)
        assert share.equal(given[:2])


def test_afterwards_and_in_other_threads_collectives_are_what_they_were() -> None:
    names = ("allreduce", "send", "barrier")
    methods = [vars(dist.ProcessGroup)[name] for name in names]
    seen: list[Tensor] = []

    def elsewhere() -> None:
        tensor = torch.ones(2)
        dist.all_reduce(tensor)  # of the real world, which has one rank
        seen.append(tensor)

    with without_peers():
        with without_peers(), pytest.raises(ZeroDivisionError):
            1 / 0  # noqa: B018
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(UnsupportedError):
            dist.new_group([0])
    assert seen[0].equal(torch.ones(2))
    assert [vars(dist.ProcessGroup)[name] for name in names] == methods
    assert dist.new_group([0]) is not None
    world: Any = dist.group.WORLD
    assert functional.all_reduce(torch.ones(1), "sum", world).equal(torch.ones(1))


# -- what needs other ranks is refused by its name --------------------------------------------------------------


def send(tensor: Tensor, group: Any) -> None:
    dist.send(tensor, group=group, group_dst=1)


def send_all(tensor: Tensor, group: Any) -> None:
    dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, group=group, group_peer=1)])


REFUSED: dict[str, tuple[str, Callable[[Tensor, Any], Any]]] = {
    "new_group": (r"torch\.distributed\.new_group", lambda _, group: dist.new_group([0])),
    "subgroups": (r"torch\.distributed\.new_subgroups", lambda _, group: dist.new_subgroups(1)),
    "send": (r"torch\.distributed\.send", send),
    "irecv": (r"torch\.distributed\.irecv", lambda tensor, group: dist.irecv(tensor, group=group, group_src=1)),
    "batch": (r"torch\.distributed\.batch_isend_irecv", send_all),
    "store": (r"Store\.get", lambda _, group: dist.distributed_c10d._get_default_store().get("never set")),
    "objects": (
        r"torch\.distributed\.broadcast_object_list",
        lambda _, group: dist.broadcast_object_list([None], group=group, group_src=1),
    ),
    "split": (
        r"torch\.distributed\.all_to_all_single",
        lambda tensor, group: dist.all_to_all_single(tensor, tensor, [3, 1], [3, 1], group=group),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_other_ranks_is_refused_by_its_name_and_place(case: str) -> None:
    name, call = REFUSED[case]

    def build_model(width: int) -> nn.Module:
        with group_of(2) as group:
            call(torch.ones(4), group)
        return nn.Linear(width, width)

    with pytest.raises(UnsupportedError, match=rf"{name}.*test_one_rank\.py:\d+.*before the engine.*close over"):
        build_on_meta(build_model, {"width": 4})


def test_a_forward_pass_that_sends_is_not_run_and_says_so() -> None:
    class Sender(nn.Module):
        def __init__(self, group: Any) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.group = group

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden: Tensor = self.embed(input_ids)
            send(hidden, self.group)
            return hidden

    with group_of(2) as group, pytest.raises(PlanError, match=r"\.send in send \(.*\.py:\d+\), inside Sender,"):
        run(Sender(group), next(token_calls(Sender(group), 0)))


def test_a_collective_without_any_group_tells_how_to_make_one() -> None:
    from torch.distributed import distributed_c10d

    def build_model(width: int) -> nn.Module:
        dist.barrier()
        return nn.Linear(width, width)

    world, distributed_c10d.GroupMember.WORLD = distributed_c10d.GroupMember.WORLD, None
    try:
        with pytest.raises(PlanError, match=r"torch\.distributed\.barrier in build_model.*no process group.*HashStore"):
            build_on_meta(build_model, {"width": 4})
    finally:
        distributed_c10d.GroupMember.WORLD = world
    build_on_meta(build_model, {"width": 4})
