"""Normal random numbers that are a function of (seed, growth, parameter name, element index).

Every topology and every order of work draws the same value for the same element: a counter-based generator
(SplitMix64, Steele et al. 2014, doi:10.1145/2714064.2660195) hashes the element's index, and the inverse normal CDF
turns the hash into a normal deviate. Both run on the CPU, where they don't depend on an element's position in a
vector, so that a GPU engine and a checkpoint on disk get the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# SplitMix64's constants, as two's complement int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def stream_key(seed: int, growth: int, name: str) -> int:
    """The 64-bit key (as int64) of one parameter's random stream at one growth."""
    digest = hashlib.blake2b(f"{seed}/{growth}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def standard_normal(key: int, index: Tensor) -> Tensor:
    """Standard normal deviates of the elements ``index`` in the stream ``key``.

    Args:
        key: from :func:`stream_key`.
        index: int64 element indices on the CPU, any shape.

    Returns:
        float64 of the shape of ``index``.
    """
    x = index * _GOLDEN + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = x ^ _shift_right(x, 31)
    uniform = (_shift_right(x, 12).double() + 0.5) * 2.0**-52  # in (0, 1), exact
    return torch.special.ndtri(uniform)
