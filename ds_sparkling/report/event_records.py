"""The records of an event file, each checked by its checksums; what can't be read is told, and what follows is read.

A record is its length (8 bytes), that number's checksum (4), the data, and the data's checksum (4). TensorBoard's own
reader ends without a word at the first record that doesn't check.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Bytes of a file that can't be read.

    Attributes:
        begin, end: where they stand.
        unfinished: whether it is a last record that isn't whole, as there is while a run writes.
    """

    begin: int
    end: int
    unfinished: bool = False


def records(path: Path) -> Iterator[tuple[int, bytes] | Unread]:
    """Where each record of a file begins and what is in it, in order; in between, what can't be read.

    A record whose data doesn't check is passed over. Where a length doesn't check, nobody knows where the next record
    begins, so the rest of the file is unread.

    Raises:
        OSError: if the file can't be read.
    """
    from tensorboard.summary.writer.record_writer import masked_crc32c  # here, so that --help doesn't wait for it

    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 0
        while begin < size:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                yield Unread(begin=begin, end=size, unfinished=True)
                return
            length, check = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != check:
                yield Unread(begin=begin, end=size)
                return
            end = begin + _HEADER.size + length + _FOOTER.size
            if end > size:
                yield Unread(begin=begin, end=size, unfinished=True)
                return
            data = file.read(length)
            if file.read(_FOOTER.size) == _FOOTER.pack(masked_crc32c(data)):
                yield begin, data
            else:
                yield Unread(begin=begin, end=end)
            begin = end
