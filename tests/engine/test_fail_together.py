"""Ranks agree on how it went, whatever becomes of one of them, and none waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from benchmarks.common import free_port
from distributed import forking
from hurry import WAITS, in_a_hurry

pytestmark = pytest.mark.ranks

#: What one rank of three does while the others are on their way to settle, and what all hear of it.
PRIVATE = {
    "raises": "testing failed on rank 2: KeyError: 'mine'",
    "exits": "testing failed on rank 2: SystemExit: 3",
    "is killed": "of 3 ranks, 2 didn't come",
    "never comes": "of 3 ranks, 2 didn't come",
    "does something else": "is elsewhere",
}
#: The same while they are in a collective that needs it.
TOGETHER = {
    "raises": "testing failed on rank 2: KeyError: 'mine'",
    "exits": "testing failed on rank 2: SystemExit: 3",
    "is killed": "of 3 ranks, 2 didn't come",
    "raises before a roll call of its own": "testing failed on rank 2: KeyError: 'mine'",
    "raises before a collective of its own": "testing failed on rank 2: KeyError: 'mine'",
    "is killed before a collective of its own": "of 3 ranks, 2 didn't come",
}


def serve(rank: int, ranks: int, port: int, answer: Connection, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    with in_a_hurry():
        answer.send(job(*args))
    time.sleep(60)  # until all have answered: the first rank has the store


def run(ranks: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``job(*args)`` gives on every rank, in processes of their own; None from those that end before.

    Nothing in there needs DeepSpeed's process group.
    """
    context, port = forking(), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=serve, args=(rank, ranks, port, pipe[1], job, args)) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    answers = []
    for reading, writing in pipes:
        writing.close()
        try:
            answers.append(reading.recv() if reading.poll(40) else "hangs")
        except EOFError:
            answers.append(None)
    for process in processes:
        process.kill()
        process.join()
    return answers


def misbehave(how: str) -> None:
    if how.startswith("raises"):
        raise KeyError("mine")
    if how == "exits":
        sys.exit(3)
    if how.startswith("is killed"):
        os.kill(os.getpid(), signal.SIGKILL)


def privately(how: str) -> str:
    from ds_sparkling.engine.fail_together import FailTogether
    from ds_sparkling.errors import GrowthError

    last = torch.distributed.get_rank() == 2
    if last and how == "never comes":
        time.sleep(8)
        return "elsewhere"
    all_ranks = FailTogether(
        "testing", alike="elsewhere" if last and how == "does something else" else None, patience=4.0
    )
    try:
        with all_ranks:
            if last:
                misbehave(how)
        all_ranks.settle()
    except GrowthError as error:
        return str(error)
    return "went through"


def together(how: str) -> str:
    from ds_sparkling.engine.fail_together import FailTogether, of_first_rank
    from ds_sparkling.errors import GrowthError

    last = torch.distributed.get_rank() == 2
    all_ranks = FailTogether("testing", patience=4.0)
    try:
        with all_ranks.together():
            if last:
                misbehave(how)
            if how.endswith("roll call of its own"):
                FailTogether("part of it").settle()
            if how.endswith("collective of its own"):
                of_first_rank(1, FailTogether("part of it"))
            torch.distributed.all_reduce(torch.ones(3))
        all_ranks.settle()
    except GrowthError as error:
        with pytest.raises(GrowthError, match="in the middle of different collectives"):
            FailTogether("going on").settle()
        return str(error)
    return "went through"


def test_waits_are_long_enough_for_busy_machines() -> None:
    from ds_sparkling.engine import rollcall

    for name, (shipped, _) in WAITS.items():
        assert getattr(rollcall, name) == shipped


@pytest.mark.parametrize("how", PRIVATE)
def test_what_becomes_of_one_rank_is_an_error_on_all(how: str) -> None:
    answers = run(3, privately, how)
    gone = how in ("exits", "is killed", "never comes")
    assert all(PRIVATE[how] in text for text in answers[: 2 if gone else 3]), answers


@pytest.mark.parametrize("how", TOGETHER)
def test_what_becomes_of_one_rank_in_a_collective_is_an_error_on_all(how: str) -> None:
    answers = run(3, together, how)
    gone = how.startswith(("exits", "is killed"))
    assert all(TOGETHER[how] in text for text in answers[: 2 if gone else 3]), answers


def go_on() -> tuple[str, int]:
    """A failure on all ranks at once, or outside of collectives, leaves them in step."""
    from ds_sparkling.engine import rollcall
    from ds_sparkling.engine.fail_together import FailTogether
    from ds_sparkling.errors import PlanError

    rank = torch.distributed.get_rank()
    all_ranks = FailTogether("testing")
    with all_ranks:
        if rank > 0:
            raise PlanError(f"on {rank}")
    with pytest.raises(PlanError) as lowest:
        all_ranks.settle()
    with all_ranks.together():
        raise PlanError("alike")
    with pytest.raises(PlanError, match="on rank 0: alike"):
        all_ranks.settle()
    for _ in range(3):
        FailTogether("going on").settle()
    torch.distributed.all_reduce(torch.ones(1))
    assert rollcall._attendance is not None
    keys = rollcall._attendance.store.list_keys() if hasattr(rollcall._attendance.store, "list_keys") else []
    return str(lowest.value), sum("call" in str(key) and "outcome" in str(key) for key in keys)


def test_ranks_that_failed_alike_go_on_and_clean_up() -> None:
    answers = run(3, go_on)
    assert answers == [("testing failed on rank 1: on 1", answers[0][1])] * 3
    assert answers[0][1] <= 4  # the failed ones and the last


def fail_alike_inside() -> int:
    """How often a failure that all ranks hear of in a roll call inside of another one leaves them in step."""
    from ds_sparkling.engine.fail_together import FailTogether
    from ds_sparkling.errors import PlanError

    rank = torch.distributed.get_rank()
    for _ in range(50):
        outer = FailTogether("testing")
        with outer.together():
            inner = FailTogether("part of it")
            with inner:
                if rank == 1:
                    raise PlanError("alike")
            inner.settle()
        with pytest.raises(PlanError, match="alike"):
            outer.settle()
    return 50


def test_what_all_ranks_hear_inside_leaves_them_in_step() -> None:
    assert run(3, fail_alike_inside) == [50] * 3


def slowly() -> str:
    from ds_sparkling.engine import rollcall
    from ds_sparkling.engine.fail_together import FailTogether

    rollcall._GONE = 0.9  # signs of life come three times as often
    all_ranks = FailTogether("working", patience=0.5)
    with all_ranks:
        if torch.distributed.get_rank() == 1:
            time.sleep(2)
    all_ranks.settle()
    return "went through"


def test_a_rank_that_works_for_long_is_waited_for() -> None:
    assert run(2, slowly) == ["went through"] * 2


def nest_with_a_slow_first_rank() -> str:
    """The others come out of the inner roll call, and into the outer one's end, before the first rank does."""
    from ds_sparkling.engine import rollcall
    from ds_sparkling.engine.fail_together import FailTogether

    attendance: Any = rollcall._Attendance
    plain = attendance.forget_before

    def slow(*args: Any) -> None:
        time.sleep(0.5)
        plain(*args)

    attendance.forget_before = slow
    for _ in range(2):
        outer = FailTogether("testing")
        with outer.together():
            FailTogether("part of it").settle()
        outer.settle()
    return "went through"


def test_a_roll_call_inside_of_another_forgets_nothing_of_it() -> None:
    assert run(2, nest_with_a_slow_first_rank) == ["went through"] * 2


def start_anew() -> list[int]:
    from ds_sparkling.engine.fail_together import FailTogether, of_first_rank

    found = []
    for number in range(3):
        all_ranks = FailTogether(f"working {number}")
        found.append(of_first_rank(number + torch.distributed.get_rank(), all_ranks))
        port = [str(free_port())]  # a rank might find the old store at the old one, about to end
        torch.distributed.broadcast_object_list(port)
        torch.distributed.destroy_process_group()
        os.environ["MASTER_PORT"] = port[0]
        torch.distributed.init_process_group("gloo")
    return found


def test_process_groups_are_destroyed_and_made_anew() -> None:
    assert run(2, start_anew) == [[0, 1, 2]] * 2


QUIET_EXIT = """
import time, torch
from ds_sparkling.engine import rollcall
from ds_sparkling.engine.fail_together import FailTogether
torch.distributed.init_process_group("gloo")
rollcall._BEAT = 0.0
for _ in range(20):
    FailTogether("working").settle()
all_ranks = FailTogether("ending")
with all_ranks:
    time.sleep(0.05)
all_ranks.settle()
"""


def test_a_script_ends_without_a_word_while_signs_of_life_are_given() -> None:
    port = str(free_port())
    places = [
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in (0, 1)
    ]
    processes = [
        subprocess.Popen([sys.executable, "-c", QUIET_EXIT], env=os.environ | place, stderr=subprocess.PIPE, text=True)
        for place in places
    ]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert "terminate called" not in said
        assert process.returncode == 0, said
