"""Bytes that a rank gets from others in DeepSpeed's collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from deepspeed import comm as dist
from torch import Tensor


@dataclass(frozen=True)
class Collective:
    """One collective, as this rank has called it.

    Attributes:
        name: of the backend's method.
        received: bytes that came from other ranks.
        buffer: bytes of what it was received into.
    """

    name: str
    received: int
    buffer: int


@contextmanager
def recorded() -> Iterator[list[Collective]]:
    """The collectives that are called within."""
    seen: list[Collective] = []
    backend = dist.comm.cdb

    def recording(name: str, of_call: Callable[..., tuple[int, int]]) -> Any:
        plain = getattr(backend, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            seen.append(Collective(name, *of_call(*args, **kwargs)))
            return plain(*args, **kwargs)

        return mock.patch.object(backend, name, called)

    with ExitStack() as stack:
        for name, of_call in _RECEIVED.items():
            stack.enter_context(recording(name, of_call))
        yield seen


def _broadcast(tensor: Tensor, src: int, **_: Any) -> tuple[int, int]:
    return (0 if dist.get_rank() == src else tensor.nbytes), tensor.nbytes


def _all_gather_into_tensor(output_tensor: Tensor, input_tensor: Tensor, **_: Any) -> tuple[int, int]:
    return output_tensor.nbytes - input_tensor.nbytes, output_tensor.nbytes


def _all_gather(tensor_list: list[Tensor], tensor: Tensor, **_: Any) -> tuple[int, int]:
    whole = sum(each.nbytes for each in tensor_list)
    return whole - tensor.nbytes, whole


def _all_reduce(tensor: Tensor, *_args: Any, **_: Any) -> tuple[int, int]:
    return tensor.nbytes, tensor.nbytes


def _all_to_all_single(
    output: Tensor, input: Tensor, output_split_sizes: list[int], *_args: Any, group: Any = None, **_: Any
) -> tuple[int, int]:
    own = output_split_sizes[dist.get_rank(group)] * output.itemsize
    return output.nbytes - own, output.nbytes


_RECEIVED: dict[str, Callable[..., tuple[int, int]]] = {
    "broadcast": _broadcast,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "all_to_all_single": _all_to_all_single,
}
