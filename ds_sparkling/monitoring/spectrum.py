"""Measure how many directions of its space a matrix makes use of."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_rank(matrix: Tensor) -> float:
    """exp(-sum p_i ln p_i), where p_i are the singular values over their sum (Roy & Vetterli, EUSIPCO 2007).

    Between 1 and the smaller side of the matrix; 0 for a matrix of zeros, NaN where not all is finite. The singular
    values come from the eigenvalues of the smaller Gram matrix in fp64, which resolves them to 1e-8 of the largest.

    Args:
        matrix: [rows, columns].
    """
    values = matrix.double()
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    if not gram.isfinite().all():
        return math.nan
    singular = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    shares = singular / total
    return float(torch.special.entr(shares).sum().exp())
