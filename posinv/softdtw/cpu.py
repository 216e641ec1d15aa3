"""Soft-DTW on the CPU: numba, parallel over the batch, SIMD along anti-diagonals.

A cell ``(i, j)`` depends on its anti-diagonal ``d = i + j`` only through ``d - 1`` and ``d - 2``,
so the cells of one anti-diagonal are independent. Each utterance's cost is first packed diagonal
by diagonal (only the cells inside its lengths and band), so that every inner loop runs over
contiguous memory and LLVM vectorises it. For this it must also prove that the arrays of a loop
do not overlap, which it gives up on beyond eight pairs: hence several short loops rather than one.

The accumulated cost is kept in float64, in three rolling diagonals: in float32, at 4,000 frames
and a gamma of 0.01, its rounding alone would change the softmin weights by percents. Exponentials
and logarithms are of differences, and those are float32 for float32 costs.

The alignment needs of each cell only two softmin weights (the three sum to one). They are written
during the forward pass, the first one over the packed cost, and then replaced, diagonal by
diagonal, by the alignment.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

_UNREACHABLE = 1e300  # the accumulated cost outside the band; finite, as inf - inf is not a number
_STRIP = 16  # rows packed together: one cache line of float32 on the diagonal's side
_BLOCK = 512  # cells of a diagonal processed together: scratch and diagonals stay in the L1 cache

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves a float32's nearest integer in the low bits
_EXP2_MIN = np.float32(-100.0)  # below, a weight is taken as zero
# Minimax polynomials: 2^x on [-1/2, 1/2] (relative error 2e-9); log(1 + x)/x on [-1/4, 1/2] (3e-8).
_E1, _E2, _E3, _E4, _E5, _E6 = np.array(
    [
        0.6931472028550816,
        0.24022647913626521,
        0.05550332471100014,
        0.009618437357822546,
        0.001339887442229716,
        0.00015353361888212,
    ],
    dtype=np.float32,
)
_L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = np.array(
    [
        -0.5000006064920711,
        0.33333548552969583,
        -0.2499344226847672,
        0.19977077303113977,
        -0.16822811587983041,
        0.14983915828922184,
        -0.12067367139702936,
        0.05413247087993037,
    ],
    dtype=np.float32,
)

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})


@_jit
def _exp2_float32(x):
    """2^x for x <= 0: 2^n 2^f with n the nearest integer, added to the exponent bits."""
    z = _EXP2_MIN if x < _EXP2_MIN else x
    n = z + _ROUND
    f = z - (n - _ROUND)
    p = _ONE + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
    bits = np.float32(p).view(np.int32) + (np.float32(n).view(np.int32) << np.int32(23))
    return np.int32(bits).view(np.float32) if x > _EXP2_MIN else np.float32(0.0)


@_jit
def _log1p_float32(x):
    """log(1 + x) for 0 <= x <= 2."""
    large = x > _HALF
    r = _HALF * (x - _ONE) if large else x
    p = _L1 + r * (_L2 + r * (_L3 + r * (_L4 + r * (_L5 + r * (_L6 + r * (_L7 + r * _L8))))))
    return r + r * (r * p) + (np.float32(_LN_2) if large else np.float32(0.0))


def _exp2(x):
    raise NotImplementedError("compiled code only")


def _log1p(x):
    raise NotImplementedError("compiled code only")


@overload(_exp2)
def _exp2_overload(x):
    if x == types.float32:
        return lambda x: _exp2_float32(x)
    return lambda x: math.exp(x * _LN_2)


@overload(_log1p)
def _log1p_overload(x):
    if x == types.float32:
        return lambda x: _log1p_float32(x)
    return lambda x: math.log1p(x)


@_jit
def _rows(d, n, m, band):
    """First row and one past the last row of anti-diagonal d inside the lengths and the band."""
    first = max(0, d - m + 1, (d - band + 1) // 2)
    last = min(n - 1, d, (d + band) // 2)
    return first, last + 1


@_jit
def _pack(cost, start, n, m, band, packed):
    """Copy cost[i, j] to packed[start[i + j] + i]."""
    for top in range(0, n, _STRIP):
        bottom = min(top + _STRIP, n)
        for d in range(top, bottom - 1 + m):
            first, stop = _rows(d, n, m, band)
            first, stop = max(first, top), min(stop, bottom)
            if stop - first == _STRIP:
                for r in range(_STRIP):
                    packed[start[d] + top + r] = cost[top + r, d - top - r]
            else:
                for i in range(first, stop):
                    packed[start[d] + i] = cost[i, d - i]


@_jit
def _unpack(packed, start, n, m, band, out):
    """Copy packed[start[i + j] + i] to out[i, j], with zeros everywhere else."""
    out[n:] = 0
    for i in range(n):
        out[i, : max(0, i - band)] = 0
        out[i, min(m, i + band + 1) :] = 0
    for top in range(0, n, _STRIP):
        bottom = min(top + _STRIP, n)
        for d in range(top, bottom - 1 + m):
            first, stop = _rows(d, n, m, band)
            first, stop = max(first, top), min(stop, bottom)
            if stop - first == _STRIP:
                for r in range(_STRIP):
                    out[top + r, d - top - r] = packed[start[d] + top + r]
            else:
                for i in range(first, stop):
                    out[i, d - i] = packed[start[d] + i]


@_jit
def _soft_step(diagonal, beside, out, cost, left_weight, scratch, gamma):
    """Accumulated cost and softmin weights of consecutive cells of one anti-diagonal.

    Cell k's predecessors are diagonal[k] (i-1, j-1), beside[k] (i-1, j), beside[k + 1] (i, j-1).
    The weight of (i-1, j) replaces the cost.
    """
    size = len(out)
    x_diagonal, x_up, x_left = scratch[0, :size], scratch[1, :size], scratch[2, :size]
    scale = _LOG2_E / gamma
    for k in range(size):
        a, b, c = diagonal[k], beside[k], beside[k + 1]
        low = a if a < b else b
        low = low if low < c else c
        x_diagonal[k] = (low - a) * scale
        x_up[k] = (low - b) * scale
        x_left[k] = (low - c) * scale
        out[k] = low + cost[k]
    for k in range(size):
        e_diagonal, e_up, e_left = _exp2(x_diagonal[k]), _exp2(x_up[k]), _exp2(x_left[k])
        total = e_diagonal + e_up + e_left
        scale_weight = _ONE / total
        cost[k] = e_up * scale_weight
        left_weight[k] = e_left * scale_weight
        x_diagonal[k] = _log1p(total - _ONE)
    for k in range(size):
        out[k] -= gamma * x_diagonal[k]


@_jit
def _hard_step(diagonal, beside, out, cost, left_weight):
    """As _soft_step for gamma = 0; of equal predecessors, (i-1, j-1), then (i-1, j), is taken."""
    for k in range(len(out)):
        a, b, c = diagonal[k], beside[k], beside[k + 1]
        low = a if a <= b else b
        out[k] = cost[k] + (low if low <= c else c)
        left_weight[k] = c < low
        cost[k] = b < a and b <= c


@_jit
def _check(cost, check):
    """Make check a NaN where a cost is not finite, which a minimum may pass over."""
    for k in range(len(cost)):
        check[k] += cost[k] * np.float32(0)


@_jit
def _forward(n, m, band, gamma, start, packed, left, keep):
    """Accumulated cost of the last cell; the weights replace packed and, if keep, fill left."""
    scratch = np.empty((4, _BLOCK), packed.dtype)
    check = np.zeros(n, packed.dtype)
    rolling = np.full((3, n + 2), _UNREACHABLE)  # column i + 1 holds row i
    rolling[1, 0] = 0.0  # the cell before (0, 0), on diagonal -2
    for d in range(n + m - 1):
        out, beside, diagonal = rolling[d % 3], rolling[(d + 2) % 3], rolling[(d + 1) % 3]
        first, stop = _rows(d, n, m, band)
        out[first] = out[stop + 1] = _UNREACHABLE
        for a in range(first, stop, _BLOCK):
            b = min(a + _BLOCK, stop)
            here = slice(start[d] + a, start[d] + b)
            _check(packed[here], check[a:b])
            weight = left[here] if keep else scratch[3, : b - a]
            if gamma > 0:
                _soft_step(
                    diagonal[a:b],
                    beside[a : b + 1],
                    out[a + 1 : b + 1],
                    packed[here],
                    weight,
                    scratch,
                    gamma,
                )
            else:
                _hard_step(
                    diagonal[a:b], beside[a : b + 1], out[a + 1 : b + 1], packed[here], weight
                )
    return rolling[(n + m - 2) % 3, n] + np.sum(check)


@_jit
def _flow(e1, e2, up1, left1, up2, left2, out):
    """Alignment of consecutive cells of a diagonal from the two diagonals after it."""
    for k in range(len(out)):
        diagonal2 = _ONE - up2[k] - left2[k]
        diagonal2 = diagonal2 if diagonal2 > 0 else np.float32(0)
        out[k] = e1[k + 1] * up1[k] + e1[k] * left1[k] + e2[k] * diagonal2


@_jit
def _backward(n, m, band, start, packed, left):
    """Replace the weights in packed by the alignment."""
    rolling = np.zeros((3, n + 2), packed.dtype)
    last = n + m - 2
    rolling[last % 3, n] = 1
    for d in range(last - 1, -3, -1):
        out, e1, e2 = rolling[d % 3], rolling[(d + 1) % 3], rolling[(d + 2) % 3]
        if d >= 0:
            a, b = _rows(d, n, m, band)
            s1, s2 = start[d + 1], start[d + 2]
            out[a] = out[b + 1] = 0
            _flow(
                e1[a + 1 : b + 2],
                e2[a + 2 : b + 2],
                packed[s1 + a + 1 : s1 + b + 1],
                left[s1 + a : s1 + b],
                packed[s2 + a + 1 : s2 + b + 1],
                left[s2 + a + 1 : s2 + b + 1],
                out[a + 1 : b + 1],
            )
        if d + 2 <= last:
            a, b = _rows(d + 2, n, m, band)
            packed[start[d + 2] + a : start[d + 2] + b] = e2[a + 1 : b + 1]


@_jit
def _layout(n, m, band, start):
    """Fill start[d], such that packed[start[d] + i] is cell (i, d - i); return packed's size.

    Two cells of padding at either end: _backward reads one beside a diagonal, of two diagonals.
    """
    offset = 2
    for d in range(n + m + 1):
        first, stop = _rows(min(d, n + m - 2), n, m, band)
        start[d] = offset - first
        if d < n + m - 1:
            offset += stop - first
    return offset + 2


@_jit
def _utterance(cost, alignment, n, m, gamma, band, keep, start, packed, left):
    """Soft-DTW of cost[:n, :m]; its alignment goes to the whole of alignment, if keep."""
    size = _layout(n, m, band, start)
    packed[:2] = packed[size - 2 : size] = 0
    left[:2] = left[size - 2 : size] = 0
    _pack(cost, start, n, m, band, packed)
    value = _forward(n, m, band, gamma, start, packed, left, keep)
    if keep:
        if np.isnan(value):
            packed[:size] = np.nan
        else:
            _backward(n, m, band, start, packed, left)
        _unpack(packed, start, n, m, band, alignment)
    return value


@_jit
def _share(cost, alignment, lengths, gamma, band, keep, utterances, value):
    """One thread's utterances, one after the other in the same memory."""
    start = np.empty(cost.shape[1] + cost.shape[2] + 1, np.int64)
    size = 0
    for b in utterances:
        size = max(size, _layout(lengths[b, 0], lengths[b, 1], band, start))
    packed = np.empty(size, cost.dtype)
    left = np.empty(size if keep else 0, cost.dtype)
    for b in utterances:
        n, m = lengths[b]
        value[b] = _utterance(
            cost[b], alignment[b if keep else 0], n, m, gamma, band, keep, start, packed, left
        )


def align(
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float,
    bandwidth: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`, on as many threads as torch uses."""
    cost = cost.contiguous()
    value = cost.new_empty(len(cost))
    alignment = torch.empty_like(cost) if with_alignment else None
    lengths = torch.stack([x_lengths, y_lengths], dim=1)
    longest_first = torch.argsort(lengths.prod(dim=1), descending=True, stable=True)
    threads = min(torch.get_num_threads(), max(len(cost), 1))
    arguments = (
        cost.numpy(),
        (cost if alignment is None else alignment).numpy(),
        lengths.numpy(),
        float(gamma),
        max(cost.shape[1:]) if bandwidth is None else bandwidth,
        with_alignment,
    )
    order = longest_first.numpy()

    def share(thread: int) -> None:
        _share(*arguments, order[thread::threads], value.numpy())

    # Not numba's own threads: they share an OpenMP runtime with torch and change its settings.
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(share, range(threads)):
            pass
    return value, alignment
