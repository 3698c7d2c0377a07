"""Each rank gets the old elements that its part of the grown tensors is made of, and nothing else.

Who needs what follows from the plan and from how tensors are partitioned, so that sender and receiver work it out, each
for itself. What there is to move is cut into buckets by where it goes in the receivers' memory: they bound what is in
flight, however large a tensor is. While one bucket is widened the next is on its way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_sparkling.growth import Widener
from ds_sparkling.growth.stretches import Packed, Stretches
from ds_sparkling.growth.survey import Elements
from ds_sparkling.spec.partition import BUCKET, Piece, Pieces


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """One tensor on its way from its old partition to the new one: a parameter's weight, or one of its states.

    Attributes:
        widener: knows which old elements go where.
        key: of the state; None for the weight.
        group: the process group that both partitions are over; None if every rank holds all.
        rank: this rank's index in it.
        source: 1-D, what this rank holds of the old tensor.
        old: the old tensor's pieces by rank.
        target: 1-D, what it shall hold of the grown one.
        new: the grown tensor's pieces by rank.
        window: a number that those tensors have in common whose pieces lie in the same window of each rank.
    """

    widener: Widener
    key: str | None
    group: Any
    rank: int
    source: Tensor
    old: Pieces
    target: Tensor
    new: Pieces
    window: int

    @property
    def local(self) -> bool:
        """Whether each rank holds all that it needs."""
        return self.group is None or len(self.new) == 1

    @property
    def held(self) -> Piece:
        """Which old elements this rank has."""
        return self.old[self.rank]

    @property
    def elements(self) -> Elements:
        """Gives those."""
        first = self.held.start
        return lambda start, stop: self.source[start - first : stop - first]

    def part(self, piece: Piece) -> Tensor:
        """Where a piece of this rank's own goes."""
        first = self.new[self.rank].start
        return self.target[piece.start - first : piece.stop - first]

    def sources(self, piece: Piece) -> Stretches:
        """The old elements that a piece of the grown tensor is made of."""
        return self.widener.sources(piece.start, piece.stop, self.key)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """A piece of a grown tensor whose old elements are all here.

    Attributes:
        transfer: of which tensor.
        piece: which of its elements.
        elements: gives the old ones.
    """

    transfer: Transfer
    piece: Piece
    elements: Elements


class Exchange:
    """Moves tensors of one dtype within one process group.

    Args:
        transfers: the tensors, in the same order on all ranks of the group.
        device: where old elements go through, and end.
    """

    def __init__(self, transfers: Sequence[Transfer], device: torch.device) -> None:
        self._transfers = list(transfers)
        self._device = device
        self._group = transfers[0].group
        self._ranks = len(transfers[0].new)
        self._rooms: list[int] = []  # where each transfer's window begins, end to end with those before
        size, begins = 0, dict[int, int]()
        for transfer in transfers:
            if transfer.window not in begins:
                begins[transfer.window] = size
                size += transfer.new.window
            self._rooms.append(begins[transfer.window])
        self.buckets = -(-size // BUCKET)
        self._sent: dict[int, list[tuple[int, int]]] = defaultdict(list)  # bucket -> (receiver, transfer)
        self._received: dict[int, list[int]] = defaultdict(list)
        for index, transfer in enumerate(transfers):
            fed = transfer.widener.fed_by(transfer.held.start, transfer.held.stop, transfer.key)
            for receiver in _owners(transfer.new, fed):
                for bucket in self._buckets_of(index, receiver):
                    self._sent[bucket].append((receiver, index))
            for bucket in self._buckets_of(index, transfer.rank):
                self._received[bucket].append(index)

    def __iter__(self) -> Iterator[list[Arrival]]:
        """What has arrived, bucket by bucket. Collective."""
        on_its_way: _Posted | None = None
        for bucket in range(self.buckets):
            posted = self._post(bucket)
            if on_its_way is not None:
                yield self._arrived(on_its_way)
            on_its_way = posted
        if on_its_way is not None:
            yield self._arrived(on_its_way)

    def _buckets_of(self, index: int, rank: int) -> range:
        """The buckets that a rank's piece of a grown tensor goes into."""
        new, room = self._transfers[index].new, self._rooms[index]
        piece = new[rank]
        first = room + new.offset + piece.start - rank * new.window
        return range(first // BUCKET, -(-(first + piece.numel) // BUCKET)) if piece.numel else range(0)

    def _piece(self, index: int, rank: int, bucket: int) -> Piece:
        """The part of a rank's piece of a grown tensor that is in a bucket."""
        room = self._rooms[index]
        return self._transfers[index].new.within(rank, bucket * BUCKET - room, (bucket + 1) * BUCKET - room)

    def _post(self, bucket: int) -> _Posted:
        """Send a bucket's elements on their way."""
        sent: list[tuple[Transfer, Stretches]] = []
        to = [0] * self._ranks
        for receiver, index in sorted(self._sent[bucket]):
            transfer = self._transfers[index]
            sources = transfer.sources(self._piece(index, receiver, bucket))
            own = sources.within(transfer.held.start, transfer.held.stop)
            sent.append((transfer, own))
            to[receiver] += own.numel
        expected = [self._expected(index, bucket) for index in self._received[bucket]]
        come = [0] * self._ranks
        for each in expected:
            for rank, numel in each.parts.items():
                come[rank] += numel
        dtype = self._transfers[0].source.dtype
        sending = torch.empty(sum(to), dtype=dtype, device=self._device)
        coming = torch.empty(sum(come), dtype=dtype, device=self._device)
        at = 0
        for transfer, own in sent:
            _pack(own, transfer.source, transfer.held.start, sending[at : at + own.numel])
            at += own.numel
        handle = dist.all_to_all_single(coming, sending, come, to, group=self._group, async_op=True)
        return _Posted(handle, sending, coming, expected)

    def _expected(self, index: int, bucket: int) -> _Expected:
        transfer = self._transfers[index]
        piece = self._piece(index, transfer.rank, bucket)
        sources = transfer.sources(piece)
        parts = {}
        for rank in _owners(transfer.old, sources):
            held = transfer.old[rank]
            parts[rank] = sources.within(held.start, held.stop).numel
        return _Expected(transfer, piece, sources, parts)

    def _arrived(self, posted: _Posted) -> list[Arrival]:
        """Wait for a bucket."""
        posted.handle.wait()
        expected, come = posted.expected, posted.coming
        found: list[list[Tensor]] = [[] for _ in expected]
        at = 0
        for rank in sorted({rank for each in expected for rank in each.parts}):
            for place, each in enumerate(expected):
                if numel := each.parts.get(rank, 0):
                    found[place].append(come[at : at + numel])
                    at += numel
        arrivals = []
        for each, parts in zip(expected, found, strict=True):
            values = parts[0] if len(parts) == 1 else torch.cat(parts or [come[:0]])
            arrivals.append(Arrival(transfer=each.transfer, piece=each.piece, elements=Packed(each.sources, values)))
        return arrivals


@dataclass(frozen=True)
class _Expected:
    """What comes for one piece: of which ranks how many of the old elements."""

    transfer: Transfer
    piece: Piece
    sources: Stretches
    parts: dict[int, int]


@dataclass(frozen=True)
class _Posted:
    """A bucket that is on its way; what is sent has to stay until it has arrived."""

    handle: Any
    sending: Tensor
    coming: Tensor
    expected: list[_Expected]


def _owners(pieces: Pieces, elements: Stretches) -> list[int]:
    """The ranks that own some of the elements, or some between those of a stretch; ascending."""
    if not len(elements):
        return []
    first = (elements.starts + pieces.offset) // pieces.window
    last = (elements.stops - 1 + pieces.offset) // pieces.window
    counts = last - first + 1
    steps = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    found: list[int] = (first.repeat_interleave(counts) + steps).unique().tolist()
    return found


def _pack(elements: Stretches, tensor: Tensor, start: int, out: Tensor) -> None:
    """:meth:`Stretches.packed`, from one device to another."""
    if tensor.device == out.device:
        elements.packed(tensor, start, out)
        return
    here = torch.empty(elements.numel, dtype=tensor.dtype, device=tensor.device)
    elements.packed(tensor, start, here)
    out.copy_(here)
