"""Bytes per rank against counts by hand and against brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_sparkling.errors import ConfigError
from ds_sparkling.planner.memory import Memory, Setting, built_whole, growing, traffic, training
from ds_sparkling.planner.model import ParameterSize
from ds_sparkling.spec.partition import Pieces, even_pieces

#: A dense tensor of 100 elements, one of the rank's experts with 60, and a frozen one of 7.
TENSORS = [ParameterSize(100), ParameterSize(60, expert=True), ParameterSize(7, trained=False)]
#: On 8 ranks with experts over 2, dense tensors are cut in 8 and experts in 4: 13 + 15 elements of 160.
PIECE = 13 + 15


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, Memory(weights=2 * 167, masters=4 * 160, state=8 * 160, gradients=2 * 160)),
        (1, Memory(weights=2 * 167, masters=4 * PIECE, state=8 * PIECE, gradients=2 * 160)),
        (2, Memory(weights=2 * 167, masters=4 * PIECE, state=8 * PIECE, gradients=2 * PIECE)),
        (3, Memory(weights=2 * (PIECE + 1), masters=4 * PIECE, state=8 * PIECE, gradients=2 * PIECE)),
    ],
)
def test_training_by_hand(stage: int, expected: Memory) -> None:
    found = training(TENSORS, Setting(ranks=8, stage=stage, expert_parallel=2))
    assert found.device == expected
    assert found.host == Memory()
    assert found.total == sum(vars(expected).values())


@pytest.mark.parametrize(("stage", "masters"), [(0, 0), (1, 4 * PIECE), (2, 4 * PIECE), (3, 4 * PIECE)])
def test_fp32_weights_are_their_own_masters_without_zero_only(stage: int, masters: int) -> None:
    found = training(TENSORS, Setting(ranks=8, stage=stage, expert_parallel=2, weight_bytes=4, gradient_bytes=4)).device
    assert found.masters == masters
    assert found.weights == 4 * (PIECE + 1 if stage == 3 else 167)


def test_offload_by_hand() -> None:
    found = training(
        TENSORS, Setting(ranks=8, stage=3, expert_parallel=2, offload_optimizer=True, offload_weights=True)
    )
    assert found.device == Memory()
    gradients = (4 + 2) * PIECE
    assert found.host == Memory(weights=2 * (PIECE + 1), masters=4 * PIECE, state=8 * PIECE, gradients=gradients)
    flat = training(TENSORS, Setting(ranks=8, stage=1, expert_parallel=2, offload_optimizer=True))
    assert flat.device == Memory(weights=2 * 167, gradients=2 * 160)
    assert flat.host == Memory(masters=4 * PIECE, state=8 * PIECE, gradients=(4 + 2) * PIECE)


#: TENSORS doubled on both sides.
WIDER = [ParameterSize(400), ParameterSize(240, expert=True), ParameterSize(28, trained=False)]
WIDER_PIECE = 50 + 60


def test_growing_by_hand() -> None:
    found = growing(TENSORS, WIDER, Setting(ranks=8, stage=3, expert_parallel=2)).device
    assert found == Memory(
        weights=2 * (WIDER_PIECE + 4),
        masters=4 * WIDER_PIECE,
        state=8 * WIDER_PIECE,
        gradients=2 * WIDER_PIECE,  # ZeRO-3 has their buffer from the start
        old=12 * PIECE + 2 * 1,
        moving=5 * 4 * (WIDER_PIECE + 4),  # all that the rank is to have fits into a bucket
    )


def test_without_zero_nothing_is_gathered_or_received() -> None:
    setting = Setting(ranks=8, stage=0, expert_parallel=2)
    found = growing(TENSORS, WIDER, setting).device
    assert found == Memory(weights=2 * 668, masters=4 * 640, state=8 * 640, old=12 * 160 + 2 * 7)
    sent = traffic(TENSORS, WIDER, 10_000, setting, checkpoint=False)
    assert (sent.moved, sent.refreshed, sent.checkpoint) == (0, 0, 0)
    assert sent.start == 2 * 668  # every rank's weights come from the first of its group


def test_growing_with_offload_keeps_the_old_state_on_the_host() -> None:
    found = growing(TENSORS, WIDER, Setting(ranks=8, stage=2, expert_parallel=2, offload_optimizer=True))
    assert found.host.old == 12 * PIECE
    # What the rank makes passes through the device, too.
    assert found.device == Memory(weights=2 * 668, old=2 * 7, moving=(5 + 1) * 4 * WIDER_PIECE)
    alone = growing(TENSORS, WIDER, Setting(ranks=1, stage=2, offload_optimizer=True))
    assert alone.device.moving == 4 * (100 + 400)


def test_traffic_by_hand() -> None:
    sent = traffic(TENSORS, WIDER, 10_000, Setting(ranks=8, stage=3, expert_parallel=2), checkpoint=True)
    assert sent.moved == 12 * (50 + 3 * 15) + 2 * 4  # one for each new element; of the experts others have fewer
    assert sent.start == 2 * 10_000
    assert sent.refreshed == 0
    assert sent.received == sent.moved + sent.start
    assert sent.checkpoint == 2 * (PIECE + 1) + 12 * PIECE
    flat = traffic(TENSORS, WIDER, 10_000, Setting(ranks=8, stage=1, expert_parallel=2), checkpoint=False)
    assert flat.moved == 12 * (50 + 3 * 15)
    assert flat.refreshed == 2 * (7 * 50 + 3 * 60)
    assert flat.start == 2 * 668


def test_one_rank_receives_nothing() -> None:
    for stage in range(4):
        sent = traffic(TENSORS, WIDER, 10_000, Setting(ranks=1, stage=stage), checkpoint=False)
        assert sent.received == 0
        assert growing(TENSORS, WIDER, Setting(ranks=1, stage=stage)).device.moving == 0


def test_experts_of_one_rank_each_are_not_broadcast() -> None:
    sent = traffic(TENSORS, WIDER, 10_000, Setting(ranks=2, stage=0, expert_parallel=2), checkpoint=False)
    assert sent.start == 2 * (400 + 28)


def test_the_model_is_built_whole_unless_zero_3_partitions_it_at_once() -> None:
    assert [built_whole(5, Setting(ranks=4, stage=stage)) for stage in range(4)] == [20, 20, 20, 0]


def tensors() -> st.SearchStrategy[list[ParameterSize]]:
    return st.lists(st.builds(ParameterSize, st.integers(1, 200), st.booleans(), st.booleans()), min_size=1, max_size=6)


@given(tensors(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_partitions_hold_and_gather_what_the_pieces_say(
    held: list[ParameterSize], stage: int, expert_parallel: int, replicas: int, states: int
) -> None:
    """Against the pieces that the engine room works with, rank by rank."""
    setting = Setting(ranks=expert_parallel * replicas, stage=stage, expert_parallel=expert_parallel, states=states)
    if expert_parallel == 1:
        held = [ParameterSize(tensor.numel, trained=tensor.trained) for tensor in held]
    trained = [tensor for tensor in held if tensor.trained]
    most, received = 0, 0
    for expert, ranks in ((False, setting.ranks), (True, replicas)):
        numels = [tensor.numel for tensor in trained if tensor.expert == expert]
        window = math.ceil(sum(numels) / ranks)
        owned = [0] * ranks
        for index, numel in enumerate(numels):
            if stage == 3:
                pieces = even_pieces(numel, ranks)
            else:
                pieces = Pieces(numel, window, ranks, sum(numels[:index]))
            for rank in range(ranks):
                owned[rank] += pieces[rank].numel
        most += owned[0]
        received += min(sum(numels) - owned[0], owned[0])
    padding = setting.ranks * len(held)  # of the last pieces, all ranks' together
    found = training(held, setting).device
    assert found.masters == 4 * most
    assert found.state == 4 * states * most
    moved = traffic(trained, trained, 0, setting, checkpoint=False).moved
    assert 0 <= moved - 4 * (1 + states) * received <= 4 * (1 + states) * padding


@given(tensors(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_more_partitioning_never_takes_more(held: list[ParameterSize], stage: int, shared: int, replicas: int) -> None:
    here = training(held, Setting(ranks=shared * replicas, stage=stage, expert_parallel=shared))
    if stage < 3:
        # Padding: an element per tensor and kind.
        assert training(
            held, Setting(ranks=shared * replicas, stage=stage + 1, expert_parallel=shared)
        ).total <= here.total + 16 * len(held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 8, "stage": 4}, "no ZeRO stage 4; zero_optimization.stage"),
        (
            {"ranks": 6, "stage": 3, "expert_parallel": 4},
            "6 ranks can't be expert-parallel groups of 4; pass a --world",
        ),
        ({"ranks": 2, "stage": 0, "offload_optimizer": True}, "offload_optimizer needs ZeRO stage"),
        ({"ranks": 2, "stage": 2, "offload_weights": True}, "offload_param needs ZeRO stage 3"),
    ],
)
def test_settings_that_do_not_exist_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Setting(**arguments)  # type: ignore[arg-type]
