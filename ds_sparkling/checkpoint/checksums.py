"""Combine the CRC-32 of parts to that of the whole, as zlib's ``crc32_combine`` does.

A checksum is a polynomial over GF(2), the lowest power in the highest bit. Going on by n bytes multiplies it by x^8n.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_BYTE = 1 << 23
_ALL = 0xFFFFFFFF


def combined(parts: Iterable[tuple[int, int, int]], start: int, size: int) -> int:
    """The CRC-32 of ``size`` bytes, zero where no part is.

    Args:
        parts: (position, bytes, CRC-32) of what was written, each within the whole, none over another.
        start: the position of the first byte.
        size: how many there are.
    """
    checksum, at = 0, start
    for position, numel, part in sorted(parts):
        checksum = _then_zeros(checksum, position - at)
        checksum = _times(_power(numel), checksum) ^ part
        at = position + numel
    return _then_zeros(checksum, start + size - at)


def _then_zeros(checksum: int, count: int) -> int:
    return _times(_power(count), checksum ^ _ALL) ^ _ALL if count else checksum


def _times(first: int, second: int) -> int:
    product, bit = 0, _ONE
    while bit:
        if first & bit:
            product ^= second
        bit >>= 1
        second = (second >> 1) ^ _POLYNOMIAL if second & 1 else second >> 1
    return product


@functools.lru_cache(maxsize=1024)
def _power(count: int) -> int:
    """x to the 8 ``count``, which goes on by ``count`` bytes."""
    power, square = _ONE, _BYTE
    while count:
        if count & 1:
            power = _times(square, power)
        square = _times(square, square)
        count >>= 1
    return power
