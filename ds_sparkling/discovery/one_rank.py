"""Build and run a model on one rank alone, whatever it says to the others.

Models are tried where no other rank takes part, so a collective in a constructor or a forward pass would wait for ever.
Within :func:`without_peers` none reaches a process group. What one rank can answer is answered as if every rank held
what this one holds: a sum over N ranks is N times this rank's tensor, a gathered tensor is N copies of it. Shapes are
those of the real thing, and so is what a growth does to the function. What needs a peer (a message, a new group) is
refused by its name.

All of torch.distributed ends in methods of ProcessGroup, and its functional collectives in operators; these are
replaced, for the calling thread only. A tensor may be on any device, meta included, whatever the group's backend.
They are replaced here and not by the engine room's hooks, which this room can't import: the context undoes all of it.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ds_sparkling.errors import UnsupportedError

_lock = threading.Lock()
#: Threads that are within the context, and how deep.
_alone: Counter[int] = Counter()
_replaced = ExitStack()


@contextmanager
def without_peers() -> Iterator[None]:
    """Answer this thread's collectives without any other rank. May be nested.

    Raises:
        UnsupportedError: from within, at a call that needs another rank; names it and the way out.
    """
    if not torch.distributed.is_available():
        yield
        return
    thread = threading.get_ident()
    with _lock:
        if not _alone:
            with ExitStack() as stack:
                _replace_all(stack)
                _replaced.push(stack.pop_all())
        _alone[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _alone[thread] -= 1
            if not _alone[thread]:
                del _alone[thread]
            if not _alone:
                _replaced.close()


@contextmanager
def groups_made(model: nn.Module) -> Iterator[None]:
    """Give layers of experts the groups that DeepSpeed makes for them later, to be used :func:`without_peers` only.

    A native MoE layer is built for a number of expert-parallel ranks, but gets their group from ``initialize``. Until
    then its exchanges would go to all ranks there are, or fail.
    """
    layers: list[Any] = [module for module in model.modules() if _waits_for_group(module)]
    with ExitStack() as groups:
        made = {ranks: groups.enter_context(group_of(ranks)) for ranks in {layer.ep_size for layer in layers}}
        for layer in layers:
            layer._set_ep_group(made[layer.ep_size])
        try:
            yield
        finally:
            for layer in layers:
                layer.ep_group = layer.gate.ep_group = None


def _waits_for_group(module: nn.Module) -> bool:
    ranks = getattr(module, "ep_size", 1)
    return hasattr(module, "_set_ep_group") and isinstance(ranks, int) and ranks > 1 and module.ep_group is None


@contextmanager
def group_of(ranks: int) -> Iterator[Any]:
    """A process group of ``ranks`` ranks, of which this is the first, and behind which there is no backend."""
    distributed: Any = torch.distributed
    group, world = distributed.ProcessGroup(0, ranks), distributed.distributed_c10d._world
    backend = distributed.get_backend() if distributed.is_initialized() else "gloo"
    world.pg_map[group] = backend, None
    world.pg_names[group] = f"{ranks} ranks, for trying"
    world.pg_group_ranks[group] = {rank: rank for rank in range(ranks)}
    try:
        yield group
    finally:
        for table in (world.pg_map, world.pg_names, world.pg_group_ranks):
            table.pop(group, None)


def missing_group(error: BaseException) -> str:
    """What to add to an error that comes from a collective where no process group exists; empty for all others."""
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        return ""
    frames = list(frames_of(error))
    if not any(_communicates(frame) for frame in frames):
        return ""
    return (
        f"; {_described(reversed(frames), 'a collective')} was called where no process group exists: make one of a "
        'single rank, e.g. torch.distributed.init_process_group("gloo", rank=0, world_size=1, '
        "store=torch.distributed.HashStore()) and then deepspeed.init_distributed() for deepspeed.comm, in the module "
        "that build_model is in"
    )


# -- what is replaced, and by what -------------------------------------------------------------------------------


def _replace_all(stack: ExitStack) -> None:
    from torch.distributed import ProcessGroup, Store, distributed_c10d

    for kind in _with_subclasses(ProcessGroup):
        for name, answer in _ANSWERS.items():
            if name in kind.__dict__:
                _replace(stack, kind, name, partial(_answering, answer))
        for name in _NEED_PEERS:
            if name in kind.__dict__:
                _replace(stack, kind, name, _refusing)
    for name in ("wait", "get", "multi_get", "queue_pop", "barrier"):
        if hasattr(Store, name):
            _replace(stack, Store, name, _unless_there)
    # Whatever makes a group comes through here, before it changes the count that all ranks name groups by.
    _replace(stack, distributed_c10d, "_new_group_with_tag", _refusing)
    _replace(stack, distributed_c10d, "_check_p2p_op_list", _refusing)
    for operators in (torch.ops._c10d_functional, torch.ops._c10d_functional_autograd):
        for name, made in _FUNCTIONAL.items():
            _replace_operator(stack, operators, name, partial(_making, made))
        for name in _FUNCTIONAL_NEED_PEERS:
            _replace_operator(stack, operators, name, _refusing)
    if "torch._dynamo" in sys.modules:  # compiled code calls operators that can't be replaced
        stack.enter_context(torch.compiler.set_stance("force_eager"))


def _replace(stack: ExitStack, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    kept = vars(owner)[name]  # not getattr, which would take off what makes a method of it
    setattr(owner, name, wrapper(getattr(owner, name)))
    stack.callback(setattr, owner, name, kept)


def _replace_operator(stack: ExitStack, operators: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Within the operator, which others may hold, whether they call it or its overload."""
    packet = getattr(operators, name, None)
    for operator in () if packet is None else (packet, packet.default):
        _replace(stack, operator, "_op", wrapper)


def _c10d() -> Any:
    return torch._C._distributed_c10d


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    subclasses: list[type] = kind.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _answering(answer: Callable[[_Call], None], original: Any) -> Any:
    """A method of a process group that answers by itself."""

    def answered(group: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() not in _alone:
            return original(group, *args, **kwargs)
        with torch.no_grad():
            answer(_Call(group.rank(), group.size(), [*args, *kwargs.values()]))
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return _c10d()._create_work_from_future(done)

    return answered


def _making(made: Callable[..., Any], original: Any) -> Any:
    """A functional collective: its last positional argument is the group or the group's name."""

    def answered(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() not in _alone:
            return original(*args, **kwargs)
        *given, group = [*args, *(value for name, value in kwargs.items() if name != "out")]
        out = {"out": kwargs["out"]} if "out" in kwargs else {}
        return made(_resolved(group), *given, **out)

    return answered


def _refusing(original: Any) -> Any:
    def refused(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() not in _alone:
            return original(*args, **kwargs)
        raise _refusal(getattr(original, "__name__", str(original)))

    return refused


def _unless_there(original: Any) -> Any:
    """A method of a store that waits for keys, which other ranks may have to set."""

    def answered(store: Any, *args: Any, **kwargs: Any) -> Any:
        keys = args[0] if args else next(iter(kwargs.values()), None)
        names = [keys] if isinstance(keys, str) else list(keys or ())
        if threading.get_ident() in _alone and not store.check(names):
            raise _refusal(f"{type(store).__name__}.{original.__name__}")
        return original(store, *args, **kwargs)

    return answered


# -- answers -----------------------------------------------------------------------------------------------------


class _Call:
    """A call of a process group's method. Its overloads differ in whether tensors come in lists."""

    def __init__(self, rank: int, size: int, values: Sequence[Any]) -> None:
        self.rank = rank
        self.size = size
        self.values = values
        self.tensors: list[Any] = [value for value in values if isinstance(value, (Tensor, list, tuple))]

    @property
    def reduction(self) -> Any:
        sum_of_all = torch.distributed.ReduceOp.SUM
        return next((op for op in map(_reduction_of, self.values) if op is not None), sum_of_all)

    @property
    def root(self) -> int:
        found = (getattr(value, "rootRank", value) for value in self.values)
        return next(value for value in found if isinstance(value, int))

    def reduced(self, tensor: Tensor) -> Tensor:
        return _reduced(tensor, self.reduction, self.size)


def _reduction_of(value: Any) -> Any:
    kinds = (torch.distributed.ReduceOp, torch.distributed.ReduceOp.RedOpType)
    return value if isinstance(value, kinds) else getattr(value, "reduceOp", None)


def _reduced(tensor: Tensor, reduction: Any, ranks: int) -> Tensor:
    """What ``ranks`` tensors that are all ``tensor`` come to."""
    op = torch.distributed.ReduceOp
    if reduction == op.SUM:
        return tensor if tensor.dtype is torch.bool else tensor * ranks
    if reduction == op.PRODUCT:
        return tensor if tensor.dtype is torch.bool else tensor**ranks
    if reduction == op.BXOR:
        return tensor if ranks % 2 else torch.zeros_like(tensor)
    if any(reduction == kind for kind in (op.AVG, op.MIN, op.MAX, op.BAND, op.BOR)):
        return tensor
    raise _refusal("a reduction", f"reduces by {reduction}, which can't be answered")


def _all_reduce(call: _Call) -> None:
    for tensor in _flat(call.tensors[0]):
        tensor.copy_(call.reduced(tensor))


def _reduce(call: _Call) -> None:
    if call.root == call.rank:
        _all_reduce(call)


def _broadcast(call: _Call) -> None:
    if call.root != call.rank and any(frame.f_code.co_name.endswith("_object_list") for frame in _outwards()):
        raise _refusal("a broadcast of objects")


def _all_gather(call: _Call) -> None:
    outputs, inputs = call.tensors
    pairs = [(outputs, inputs)] if isinstance(inputs, Tensor) else zip(outputs, inputs, strict=True)
    for copies, tensor in pairs:
        _fill_each(copies, [tensor] * call.size)


def _all_gather_coalesced(call: _Call) -> None:
    outputs, inputs = call.tensors
    for copies in outputs:
        _fill_each(copies, inputs)


def _all_gather_single(call: _Call) -> None:
    outputs, inputs = map(_flat, call.tensors)
    _fill_each(outputs, [tensor.expand(call.size, *tensor.shape) for tensor in inputs])


def _reduce_scatter(call: _Call) -> None:
    output, inputs = call.tensors
    if isinstance(output, Tensor):
        output, inputs = [output], [inputs]
    _fill_each(output, [call.reduced(parts[call.rank]) for parts in inputs])


def _reduce_scatter_single(call: _Call) -> None:
    outputs, inputs = map(_flat, call.tensors)
    _fill_each(outputs, [call.reduced(tensor.reshape(call.size, -1)[call.rank]) for tensor in inputs])


def _all_to_all(call: _Call) -> None:
    outputs, inputs = call.tensors
    _fill_each(outputs, [inputs[call.rank]] * call.size)


def _all_to_all_single(call: _Call) -> None:
    output, given = call.values[:2]
    splits = [value for value in call.values[2:] if isinstance(value, (list, tuple))]
    received, sent = (list(sizes) for sizes in (*splits, [], [])[:2])
    mine = _exchanged(given, received, sent, call.rank, call.size)
    _fill_each([output], [mine.expand(call.size, *mine.shape)])


def _exchanged(tensor: Tensor, received: Sequence[int], sent: Sequence[int], rank: int, size: int) -> Tensor:
    """What every rank has for this one."""
    mine = tensor.split(list(sent))[rank] if sent else tensor.reshape(size, -1, *tensor.shape[1:])[rank]
    if received and list(received) != [mine.shape[0]] * size:
        raise _refusal(
            "an exchange", f"gets {list(received)} entries here, where ranks alike give {mine.shape[0]} each"
        )
    return mine


def _gather(call: _Call) -> None:
    if call.root == call.rank:
        _all_gather(call)


def _scatter(call: _Call) -> None:
    output, inputs = call.tensors
    if call.root != call.rank:
        raise _refusal("a scatter from another rank")
    if isinstance(output, Tensor):
        output, inputs = [output], [inputs]
    _fill_each(output, [parts[call.rank] for parts in inputs])


def _nothing(_call: _Call) -> None:
    """Of barriers, and of brackets around collectives."""


def _fill_each(outputs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for output, value in zip(outputs, values, strict=True):
        output.copy_(value.reshape(output.shape))


def _flat(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


_ANSWERS: dict[str, Callable[[_Call], None]] = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "allgather": _all_gather,
    "allgather_coalesced": _all_gather_coalesced,
    "_allgather_base": _all_gather_single,
    "all_gather_single": _all_gather_single,
    "allgather_into_tensor_coalesced": _all_gather_single,
    "all_gather_single_coalesced": _all_gather_single,
    "reduce_scatter": _reduce_scatter,
    "_reduce_scatter_base": _reduce_scatter_single,
    "reduce_scatter_single": _reduce_scatter_single,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_single,
    "reduce_scatter_single_coalesced": _reduce_scatter_single,
    "alltoall": _all_to_all,
    "alltoall_base": _all_to_all_single,
    "all_to_all_single": _all_to_all_single,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": _nothing,
    "monitored_barrier": _nothing,
    "_start_coalescing": _nothing,
    "_end_coalescing": _nothing,
}
_NEED_PEERS = ("send", "recv", "recv_anysource", "split_group", "merge_remote_group")


# -- functional collectives --------------------------------------------------------------------------------------


def _resolved(group: Any) -> Any:
    process_group = torch.distributed.ProcessGroup
    if isinstance(group, str):
        return _c10d()._resolve_process_group(group)
    return group if isinstance(group, process_group) else process_group.unbox(group)


def _named_reduction(name: str) -> Any:
    return getattr(torch.distributed.ReduceOp, name.upper())


def _each(made: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """The same for a list of tensors."""
    return lambda group, tensors, *rest: [made(group, tensor, *rest) for tensor in tensors]


def _made_sum(group: Any, tensor: Tensor, reduction: str) -> Tensor:
    return _reduced(tensor, _named_reduction(reduction), group.size()).clone()


def _made_sum_in_place(group: Any, tensor: Tensor, reduction: str) -> Tensor:
    return tensor.copy_(_made_sum(group, tensor, reduction))


def _made_copies(group: Any, tensor: Tensor, *_size: int, out: Tensor | None = None) -> Tensor:
    return torch.cat([tensor] * group.size(), out=out)


def _made_share(group: Any, tensor: Tensor, reduction: str, _size: int, out: Tensor | None = None) -> Tensor:
    share = tensor.chunk(group.size())[group.rank()]
    made = _reduced(share, _named_reduction(reduction), group.size())
    return made.clone() if out is None else out.copy_(made)


def _made_exchange(group: Any, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
    return torch.cat([_exchanged(tensor, received, sent, group.rank(), group.size())] * group.size())


def _made_self(_group: Any, tensor: Tensor, _source: int) -> Tensor:
    return tensor.clone()


def _self(_group: Any, tensor: Tensor, _source: int) -> Tensor:
    return tensor


_FUNCTIONAL: dict[str, Callable[..., Any]] = {
    "all_reduce": _made_sum,
    "all_reduce_": _made_sum_in_place,
    "all_reduce_coalesced": _each(_made_sum),
    "all_reduce_coalesced_": _each(_made_sum_in_place),
    "all_gather_into_tensor": _made_copies,
    "all_gather_into_tensor_out": _made_copies,
    "all_gather_into_tensor_coalesced": _each(_made_copies),
    "reduce_scatter_tensor": _made_share,
    "reduce_scatter_tensor_out": _made_share,
    "reduce_scatter_tensor_coalesced": _each(_made_share),
    "all_to_all_single": _made_exchange,
    "broadcast": _made_self,
    "broadcast_": _self,
}
_FUNCTIONAL_NEED_PEERS = ("isend", "irecv", "batch_p2p_ops")


# -- refusals, by name -------------------------------------------------------------------------------------------


def _refusal(called: str, why: str = "needs other ranks") -> UnsupportedError:
    return UnsupportedError(
        f"{_described(_outwards(), called)} {why}, and a model is tried on one rank alone: make process groups once, "
        "before the engine, and let build_model close over them; leave messages and waiting for others out of "
        'build_model; if the forward pass can\'t do without, set "check": false in the "sparkling" block'
    )


def _described(outwards: Iterator[FrameType], called: str) -> str:
    """The public function that was called, or else ``called``, and where: in which function, and which module's."""
    for frame in outwards:
        name, module = frame.f_code.co_name, _module(frame)
        if _communicates(frame):
            if module.startswith("torch.") and not name.startswith(("_", "wrapper")):
                called = f"torch.distributed.{name}"
        elif name == "__torch_function__":  # what trying does to torch's functions on their way
            continue
        elif not module.startswith(("torch.", "contextlib", __name__)) and module != "torch":
            place = f"{_function(frame)} ({frame.f_code.co_filename}:{frame.f_lineno})"
            owners = (outer.f_locals.get("self") for outer in outwards)
            owner = next((owner for owner in owners if isinstance(owner, nn.Module)), None)
            return f"{called} in {place}{'' if owner is None else f', inside {type(owner).__name__},'}"
    return called


def _communicates(frame: FrameType) -> bool:
    return f"{_module(frame)}.".startswith(("torch.distributed.", "deepspeed.comm."))


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _function(frame: FrameType) -> str:
    owner = frame.f_locals.get("self")
    name = frame.f_code.co_name
    return name if owner is None else f"{type(owner).__name__}.{name}"


def _outwards() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def frames_of(error: BaseException) -> Iterator[FrameType]:
    """The frames that an error has come through, the innermost last."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next
