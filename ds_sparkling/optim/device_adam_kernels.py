"""The Triton kernels of :mod:`ds_sparkling.optim.device_adam`.

Operations and their order are those of torch's fused AdamW on the CPU. Launch with ``enable_fp_fusion=False``: then no
further multiplication and addition are contracted, and an element's result doesn't depend on where it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Entries of a tensor's row of ``settings`` (float64) before the learning rates by birth, and then the ages by birth.
SETTINGS = 8
#: Entries of a tensor's row of ``rates`` (float32) before the three of every birth.
CONSTANTS = 4
#: Triton's names of kinds of numbers.
NUMBERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def prepare_rates(
    tensors, settings, rates, found_inf, births,
    DECOUPLED: tl.constexpr, SETTINGS: tl.constexpr, CONSTANTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Count a step of each tensor, and tell what its births get in it. One program per tensor.

    Args:
        tensors: int64 [tensors, 5], addresses of weights, gradient, both moments, and of the step count, or 0.
        settings: float64 [tensors, SETTINGS + 2 births]; steps taken, if their address is 0; weight decay, logarithms
            of both betas, weight of the gradient in the first moment, second beta, its complement, eps; rates; ages.
        rates: float32 [tensors, CONSTANTS + 3 births], to be written: weight of the gradient in the first moment,
            second beta, its complement, eps; by birth, decay, step size and root of the second bias correction.
        found_inf: float32, not 0 if the step is to be skipped; or None.
        births: how many.
        PADDED: a power of 2 that isn't less.
    """
    tensor = tl.program_id(0)
    row = settings + tensor * (SETTINGS + 2 * births)
    out = rates + tensor * (CONSTANTS + 3 * births)
    address = tl.load(tensors + tensor * 5 + 4)
    done = tl.load(row)
    if address != 0:
        count = address.to(tl.pointer_type(tl.float32))
        taken = tl.load(count)
        done = taken.to(tl.float64)
        if found_inf is not None:
            tl.store(count, tl.where(tl.load(found_inf) == 0, taken + 1, taken))
        else:
            tl.store(count, taken + 1)
    weight_decay = tl.load(row + 1)
    constant = tl.arange(0, CONSTANTS)
    tl.store(out + constant, tl.load(row + 4 + constant).to(tl.float32))
    birth = tl.arange(0, PADDED)
    known = birth < births
    lr = tl.load(row + SETTINGS + birth, mask=known, other=0.0)
    age = tl.load(row + SETTINGS + births + birth, mask=known, other=0.0)
    t = tl.minimum(done, age) + 1
    if DECOUPLED:
        decay = 1 - lr * weight_decay
    else:
        decay = tl.zeros((PADDED,), tl.float64) + weight_decay
    size = lr / (1 - tl.exp(t * tl.load(row + 2)))
    root = tl.sqrt(1 - tl.exp(t * tl.load(row + 3)))
    tl.store(out + CONSTANTS + 3 * birth, decay.to(tl.float32), mask=known)
    tl.store(out + CONSTANTS + 3 * birth + 1, size.to(tl.float32), mask=known)
    tl.store(out + CONSTANTS + 3 * birth + 2, root.to(tl.float32), mask=known)


@triton.jit
def _step_tile(p_ptr, g_ptr, m_ptr, v_ptr, mask, constants, rate, grad_scale, DECOUPLED: tl.constexpr):
    """Step the elements at the pointers that ``mask`` takes (None: all)."""
    p = tl.load(p_ptr, mask=mask).to(tl.float32)
    g = tl.load(g_ptr, mask=mask).to(tl.float32)
    m = tl.load(m_ptr, mask=mask).to(tl.float32)
    v = tl.load(v_ptr, mask=mask).to(tl.float32)
    decay = tl.load(rate)
    size = tl.load(rate + 1)
    root = tl.load(rate + 2)
    weight = tl.load(constants)
    beta2 = tl.load(constants + 1)
    complement = tl.load(constants + 2)
    eps = tl.load(constants + 3)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.zeros_like(g) + tl.load(grad_scale))
        tl.store(g_ptr, g.to(g_ptr.dtype.element_ty), mask=mask)
    if DECOUPLED:
        p = p * decay
    else:
        g = tl.fma(p, decay, g)
    # torch.lerp starts from the nearer end: the weight is negative if that is the gradient.
    m = tl.fma(tl.zeros_like(g) + weight, g - m, tl.where(weight > 0, m, g))
    v = tl.fma(complement * g, g, v * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
    p = p - tl.div_rn(size * m, denominator)
    tl.store(p_ptr, p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def step_elements(
    programs, entries, stops, run_births, tensors, rates, births, found_inf, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    DECOUPLED: tl.constexpr, ALIGNED: tl.constexpr, CONSTANTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Step the elements of many tensors, one tile of an entry per program.

    Args:
        programs: int32 [programs], the entry of each.
        entries: int64 [entries, 7]: its tensor, first element, element after the last, length of its rows, number of
            the first program's tile less that of the program, where its runs begin, bisections that find one of them.
        stops: int32, the columns after the runs' last, in each row's runs padded to a power of 2.
        run_births: int32, the runs' births.
        tensors, rates, births, found_inf: as in :func:`prepare_rates`.
        grad_scale: float32 that the gradients, which are written back, are to be divided by; or None.
        P, G, M, V: numbers in weights, gradients and both moments.
        ALIGNED: all addresses are multiples of 16.
        TILE: elements of a tile; tiles are aligned in the tensor, so that loads are vectors wherever an entry begins.
    """
    if found_inf is not None:  # noqa: SIM102 - the first is decided when this is compiled
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    entry = entries + tl.load(programs + program).to(tl.int64) * 7
    tensor = tl.load(entry)
    start = tl.load(entry + 1)
    stop = tl.load(entry + 2)
    row = tl.load(entry + 3)
    first = (tl.load(entry + 4) + program) * TILE
    runs = tl.load(entry + 5)
    bisections = tl.load(entry + 6).to(tl.int32)
    address = tensors + tensor * 5
    p_ptr = tl.load(address).to(tl.pointer_type(P))
    g_ptr = tl.load(address + 1).to(tl.pointer_type(G))
    m_ptr = tl.load(address + 2).to(tl.pointer_type(M))
    v_ptr = tl.load(address + 3).to(tl.pointer_type(V))
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
    lane = tl.arange(0, TILE)
    p_ptr += first + lane
    g_ptr += first + lane
    m_ptr += first + lane
    v_ptr += first + lane
    run = tl.zeros((TILE,), tl.int32)
    if bisections > 0:
        # Not negative, even in an entry's first tile; 32 bits from here on.
        column = ((first - start) % row + row).to(tl.int32) + lane
        column = column % row.to(tl.int32)
        for number in range(bisections):
            probe = run + (1 << (bisections - 1 - number))
            run = tl.where(tl.load(stops + runs + probe - 1) <= column, probe, run)
    constants = rates + tensor * (CONSTANTS + 3 * births)
    rate = constants + CONSTANTS + 3 * tl.load(run_births + runs + run)
    if (first >= start) & (first + TILE <= stop):
        _step_tile(p_ptr, g_ptr, m_ptr, v_ptr, None, constants, rate, grad_scale, DECOUPLED)
    else:
        mask = (first + lane >= start) & (first + lane < stop)
        _step_tile(p_ptr, g_ptr, m_ptr, v_ptr, mask, constants, rate, grad_scale, DECOUPLED)
