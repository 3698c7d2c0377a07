"""Normal random numbers that are a function of (seed, growth, parameter name, row, column).

Every topology and every order of work draws the same value for the same element, and every device the same bits. A
hash of the element's place is made of integers: SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195) gives each
row a key of 64 bits, and triple32 (Wellons, https://github.com/skeeto/hash-prospector) hashes the column with it, which
takes 32-bit multiplications only. A rational function turns the hash into a normal deviate. It is made of fp32 sums,
products and one quotient, each rounded by itself as IEEE 754 says, and is within 2e-5 of the inverse normal CDF. Over
all 2^32 hashes the mean is 0, the root mean square 1 + 3e-7, the fourth moment 3.000006, and the largest deviate 6.34.

There are two ways to the same bits: PyTorch's operations on any device, and on the CPU ``random.cpp``.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ds_sparkling.native import library

_SOURCE = Path(__file__).with_name("random.cpp")

# SplitMix64's constants, as two's complement int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
# triple32's, as int32.
_TRIPLE_1 = 0xED5AD4BB - 2**32
_TRIPLE_2 = 0xAC4C1B51 - 2**32
_TRIPLE_3 = 0x31848BAB

# Minimax polynomials, from the highest power down. _BEND is (log2(1 + s) - s) / (s (1 - s)) for s from 0 to 1; a
# deviate is r * _ABOVE(r) / _BELOW(r), where r = -log2(2p) and p is the probability beyond it.
_BEND = (-0.0451490433, 0.148426647, -0.267179406, 0.441917039)
_ABOVE = (0.000881497458, 0.0588068727, 0.544498422, 0.868433063)
_BELOW = (2.92561466e-05, 0.00825960539, 0.203938698, 0.971077420, 1.0)


def stream_key(seed: int, growth: int, name: str) -> int:
    """The 64-bit key (as int64) of one parameter's random stream at one growth."""
    digest = hashlib.blake2b(f"{seed}/{growth}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def standard_normal(key: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard normal deviates of the elements at some rows and columns of the stream ``key``.

    Args:
        key: from :func:`stream_key`.
        rows: int64 of shape [R].
        columns: from 0 to 2^31 - 1, of shape [C], on the device of ``rows``.

    Returns:
        fp32 of shape [R, C], on the same device.
    """
    x = rows * _GOLDEN + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = (x ^ _shift_right(x, 31))[:, None]
    hashes = columns.int() + ((x << 32) >> 32).int()
    hashes = (hashes ^ _shift_right(hashes, 17)).mul_(_TRIPLE_1)
    hashes ^= (x >> 32).int()
    hashes = (hashes ^ _shift_right(hashes, 11)).mul_(_TRIPLE_2)
    hashes = (hashes ^ _shift_right(hashes, 15)).mul_(_TRIPLE_3)
    return _deviates(hashes ^ _shift_right(hashes, 14))


def add_normal(
    out_RC: Tensor, key: int, rows: Tensor, columns: Tensor, row_factor: Tensor, column_factor: Tensor
) -> None:
    """Add ``standard_normal(key, rows, columns) * row_factor[:, None] * column_factor``, in this order, to ``out_RC``.

    Args:
        out_RC: fp32, or fp64, in which it is computed then.
        key, rows, columns: as for :func:`standard_normal`, but on any device.
        row_factor, column_factor: of shapes [R] and [C]; rounded to the dtype of ``out_RC``.
    """
    factors = row_factor.to(out_RC.dtype), column_factor.to(out_RC.dtype)
    if out_RC.device.type == "cpu" and out_RC.dtype is torch.float32 and out_RC.stride(1) == 1:
        kernel = library(_SOURCE, "drawing new entries takes longer")
        if kernel is not None:
            _add_by_kernel(kernel, out_RC, key, rows, columns, factors)
            return
    rows, columns, row_factor, column_factor = (
        tensor.to(out_RC.device, non_blocking=True) for tensor in (rows, columns, *factors)
    )
    out_RC += standard_normal(key, rows, columns).to(out_RC.dtype).mul_(row_factor[:, None]).mul_(column_factor)


def _add_by_kernel(
    kernel: ctypes.CDLL, out_RC: Tensor, key: int, rows: Tensor, columns: Tensor, factors: tuple[Tensor, Tensor]
) -> None:
    given = [rows.contiguous(), columns.int().contiguous(), *(factor.contiguous() for factor in factors)]
    kernel.ds_sparkling_add_normal(
        ctypes.c_void_p(out_RC.data_ptr()),
        *(ctypes.c_int64(number) for number in (out_RC.stride(0), *out_RC.shape, key)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in given),
        ctypes.c_int(torch.get_num_threads()),
    )


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift."""
    return (x >> bits).bitwise_and_((1 << (8 * x.itemsize - bits)) - 1)


def _deviates(hashes: Tensor) -> Tensor:
    """The deviates that int32 hashes stand for: 31 bits for how rare, and one for the sign."""
    bits = (hashes & 0x7FFFFFFF).float().add_(0.5).view(torch.int32)
    # log2 of a float: its bits are nearly that, as straight lines between powers of two, and s is the way along one.
    s = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    r = (0x4F000000 - bits).float().mul_(2.0**-23) - ((1.0 - s) * s).mul_(_polynomial(_BEND, s))
    size = (r * _polynomial(_ABOVE, r)).div_(_polynomial(_BELOW, r))
    return (size.view(torch.int32) ^ (hashes & -(2**31))).view(torch.float32)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule."""
    highest, *others = coefficients
    y = x * highest
    for coefficient in others[:-1]:
        y.add_(coefficient).mul_(x)
    return y.add_(others[-1])
