"""Soft-DTW on the CPU: numba, threads over the batch, SIMD along anti-diagonals.

A cell ``(i, j)`` depends on its anti-diagonal ``d = i + j`` only through ``d - 1`` and ``d - 2``,
so the cells of one anti-diagonal are independent. Each utterance's cost is first packed diagonal
by diagonal (only the cells inside its lengths and band), so that every inner loop runs over
contiguous memory and LLVM vectorises it. For this it must also prove that the arrays of a loop
do not overlap, which it gives up on beyond eight pairs: hence short loops, which hand on their
results in parts of one scratch array, at constant distances.

Soft-DTW is the logarithm of a sum over paths, ``r = -gamma log p`` with

    p[i, j] = exp(-c[i, j] / gamma) (p[i-1, j-1] + p[i-1, j] + p[i, j-1]),

and it is p that is accumulated, as m 2^e with an integer e of its own for every cell. That takes
one exponential a cell and no logarithm, and nothing overflows. Rounding is relative to p, not to
r / gamma, which at 4,000 frames and a gamma of 0.01 would change the weights of the predecessors
by percents in float32. float32 costs too large for 32-bit exponents are computed in float64.

The alignment needs of each cell only two predecessors' weights (the three sum to one). They are
written during the forward pass, the first one over the packed cost, and then replaced, diagonal
by diagonal, by the alignment.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

_UNREACHABLE = 1e300  # for gamma = 0, the accumulated cost outside the band
_LANES = 16  # diagonals are padded to a multiple: a cache line, the widest vector of float32
_BLOCK = 512  # cells of a diagonal processed together: scratch and diagonals stay in the L1 cache
_PART = _BLOCK + 16  # cells from one part of the scratch to the next, not a multiple of a page

_CELLS_A_THREAD = 150_000  # fewer are done before a thread has started

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})

_SAME_SIZE = {
    types.float32: types.int32,
    types.int32: types.float32,
    types.float64: types.int64,
    types.int64: types.float64,
}


@intrinsic
def _reinterpret(typing_context, x):
    """The bits of a float as an integer, or of an integer as a float."""
    other = _SAME_SIZE[x]

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(other))

    return other(x), generate


@intrinsic
def _fma(typing_context, x, y, z):
    """x y + z, rounded once."""

    def generate(context, builder, signature, args):
        return builder.fma(*args)

    return x(x, x, x), generate


@_jit
def _exp2_float32(x):
    p = np.float32(0.00015353361888212)
    p = np.float32(0.001339887442229716) + x * p
    p = np.float32(0.009618437357822546) + x * p
    p = np.float32(0.05550332471100014) + x * p
    p = np.float32(0.24022647913626521) + x * p
    p = np.float32(0.6931472028550816) + x * p
    return np.float32(1) + x * p


@_jit
def _exp2_float64(x):
    p = 4.078071929588337e-10
    p = 7.072570412814423e-09 + x * p
    p = 1.0180647659234139e-07 + x * p
    p = 1.3215442675329823e-06 + x * p
    p = 1.5252727385193868e-05 + x * p
    p = 0.0001540353044157213 + x * p
    p = 0.0013333558153439966 + x * p
    p = 0.009618129107607003 + x * p
    p = 0.05550410866479039 + x * p
    p = 0.24022650695910097 + x * p
    p = 0.6931471805599457 + x * p
    return 1.0 + x * p


def _exp2(x):
    raise NotImplementedError("compiled code only")


@overload(_exp2)
def _exp2_overload(x):
    """2^x on [-1/2, 1/2]: minimax polynomials with relative errors of 2e-9 and 2e-17."""
    if x == types.float32:
        return lambda x: _exp2_float32(x)
    return lambda x: _exp2_float64(x)


def _integers_like(x):
    raise NotImplementedError("compiled code only")


@overload(_integers_like)
def _integers_like_overload(x):
    """Room for as many integers of the size of x's floats."""
    if x.dtype == types.float32:
        return lambda x: np.empty(len(x), np.int32)
    return lambda x: np.empty(len(x), np.int64)


@_jit
def _padded(size):
    """As many cells in whole vectors."""
    return -(-size // _LANES) * _LANES


@_jit
def _rows(d, n, m, band):
    """First row and one past the last row of anti-diagonal d inside the lengths and the band."""
    first = max(0, d - m + 1, (d - band + 1) // 2)
    last = min(n - 1, d, (d + band) // 2)
    return first, last + 1


@_jit
def _layout(n, m, band, start):
    """Fill start[d], such that packed[start[d] + i] is cell (i, d - i); return packed's size.

    Padding, before, between and after, is there to be read without effect.
    """
    offset = _LANES
    for d in range(n + m + 1):
        first, stop = _rows(min(d, n + m - 2), n, m, band)
        start[d] = offset - first
        if d < n + m - 1:
            offset += _padded(stop - first)
    return offset + 2 * _LANES


@_jit
def _largest(row, largest):
    """Bits of the largest magnitude: as integers, these are ordered up to infinity and NaN."""
    for k in range(np.uintp(len(row))):
        bits = _reinterpret(abs(row[k]))
        largest = bits if bits > largest else largest
    return largest


@_jit
def _pack(cost, start, n, m, band, packed):
    """Copy cost[i, j] to packed[start[i + j] + i]; return the largest magnitude, or NaN."""
    flat, width, step = cost.reshape(-1), cost.shape[1], np.uintp(cost.shape[1] - 1)
    packed[:_LANES] = 0
    packed[-2 * _LANES :] = 0
    for d in range(n + m - 1):
        first, stop = _rows(d, n, m, band)
        packed[start[d] + stop : start[d] + first + _padded(stop - first)] = 0
    largest = _reinterpret(abs(cost[0, 0]))
    for top in range(0, n, _LANES):
        bottom = min(top + _LANES, n)
        for i in range(top, bottom):
            largest = _largest(cost[i, max(0, i - band) : min(m, i + band + 1)], largest)
        for d in range(top, bottom - 1 + m):
            first, stop = _rows(d, n, m, band)
            first, stop = max(first, top), min(stop, bottom)
            if stop - first == _LANES:
                source, target = flat[top * width + d - top :], packed[start[d] + top :]
                for r in range(_LANES):
                    target[np.uintp(r)] = source[np.uintp(r) * step]
            else:
                for i in range(first, stop):
                    packed[start[d] + i] = cost[i, d - i]
    return _reinterpret(largest)


@_jit
def _unpack(packed, start, n, m, band, out):
    """Copy packed[start[i + j] + i] to out[i, j], with zeros everywhere else."""
    flat, width, step = out.reshape(-1), out.shape[1], np.uintp(out.shape[1] - 1)
    out[n:] = 0
    for i in range(n):
        out[i, : max(0, i - band)] = 0
        out[i, min(m, i + band + 1) :] = 0
    for top in range(0, n, _LANES):
        bottom = min(top + _LANES, n)
        for d in range(top, bottom - 1 + m):
            first, stop = _rows(d, n, m, band)
            first, stop = max(first, top), min(stop, bottom)
            if stop - first == _LANES:
                source, target = packed[start[d] + top :], flat[top * width + d - top :]
                for r in range(_LANES):
                    target[np.uintp(r) * step] = source[np.uintp(r)]
            else:
                for i in range(first, stop):
                    out[i, d - i] = packed[start[d] + i]


def _soft_step(mantissa, exponent, rows, packed, left, here, size, real, whole, scale):
    raise NotImplementedError("compiled code only")


@overload(_soft_step, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def _soft_step_overload(mantissa, exponent, rows, packed, left, here, size, real, whole, scale):
    """p of consecutive cells of one anti-diagonal and, if kept, the weights of predecessors.

    rows says where diagonals d - 2, d - 1 and d are in mantissa and exponent, such that cell k's
    predecessors are d2 + k (i-1, j-1), d1 + k (i-1, j) and d1 + k + 1 (i, j-1). From here on,
    packed has the costs, which the weights of (i-1, j) replace; left gets those of (i, j-1), if it
    has room. Indices are unsigned, which spares the test for negative ones. scale, in two parts,
    is log2(e) / gamma.
    """
    if scale.dtype == types.float32:
        floating, integer, fraction_bits, reach = np.float32, np.int32, np.int32(23), np.int32(100)
    else:
        floating, integer, fraction_bits, reach = np.float64, np.int64, np.int64(52), np.int64(1000)
    none = integer(0)
    fraction = integer(2 ** int(fraction_bits) - 1)
    one_bits = floating(1).view(integer)
    rounding = floating(1.5 * 2 ** int(fraction_bits))  # sums have the integer in their low bits
    rounding_bits = rounding.view(integer)
    next_, part, part2, part3 = (
        np.uintp(1),
        np.uintp(_PART),
        np.uintp(2 * _PART),
        np.uintp(3 * _PART),
    )

    def step(mantissa, exponent, rows, packed, left, here, size, real, whole, scale):
        (d2, d1, d0), (high_scale, low_scale) = rows, scale
        # exp(-c / gamma) = real 2^whole. The fused products keep all digits of the fraction.
        for k in range(size):
            c = -packed[here + k]
            rounded = _fma(c, high_scale, rounding)
            real[k] = _exp2(_fma(c, high_scale, rounding - rounded) + c * low_scale)
            whole[k] = integer(_reinterpret(rounded) - rounding_bits)
        # The sum in units of 2^low, in which terms below 2^-reach of the largest are zero.
        for k in range(size):
            a, b, c = exponent[d2 + k], exponent[d1 + k], exponent[d1 + k + next_]
            top = a if a > b else b
            top = top if top > c else c
            low = integer(top - reach)
            a, b, c = integer(a - low), integer(b - low), integer(c - low)
            a, b, c = a if a > none else none, b if b > none else none, c if c > none else none
            diagonal = mantissa[d2 + k] * _reinterpret(integer(a << fraction_bits))
            up = mantissa[d1 + k] * _reinterpret(integer(b << fraction_bits))
            beside = mantissa[d1 + k + next_] * _reinterpret(integer(c << fraction_bits))
            real[k + part] = diagonal + up + beside
            real[k + part2] = up
            real[k + part3] = beside
            whole[k + part] = low
        if len(left):
            for k in range(size):
                packed[here + k] = real[k + part2] / real[k + part]
                left[here + k] = real[k + part3] / real[k + part]
        for k in range(size):
            bits = _reinterpret(real[k] * real[k + part])
            mantissa[d0 + k] = _reinterpret(integer((bits & fraction) | one_bits))
            exponent[d0 + k] = integer(
                integer(bits >> fraction_bits) + integer(whole[k] + whole[k + part])
            )

    return step


@_jit
def _soft_forward(n, m, band, gamma, start, packed, left):
    """r of the last cell; weights replace the packed costs and fill left, if that has room."""
    width = n + 2 + _LANES  # of a diagonal, where column i + 1 holds row i
    mantissa = np.ones(3 * width, packed.dtype)
    exponent = _integers_like(mantissa)
    unreachable = -1 << (8 * packed.itemsize - 2)
    exponent[:] = unreachable
    exponent[width] = 0  # p = 1 before (0, 0), on diagonal -2
    real = np.empty(4 * _PART, packed.dtype)
    whole = _integers_like(real)
    scale = np.empty(2, packed.dtype)
    scale[0] = math.log2(math.e) / gamma
    scale[1] = math.log2(math.e) / gamma - scale[0]
    for d in range(n + m - 1):
        d0, d1, d2 = d % 3 * width, (d + 2) % 3 * width, (d + 1) % 3 * width
        first, stop = _rows(d, n, m, band)
        for i in range(first, stop, _BLOCK):
            _soft_step(
                mantissa,
                exponent,
                (np.uintp(d2 + i), np.uintp(d1 + i), np.uintp(d0 + i + 1)),
                packed,
                left,
                np.uintp(start[d] + i),
                np.uintp(_padded(min(stop - i, _BLOCK))),
                real,
                whole,
                (scale[0], scale[1]),
            )
        exponent[d0 + first] = exponent[d0 + stop + 1] = unreachable
    last = (n + m - 2) % 3 * width + n
    return -gamma * (math.log(mantissa[last]) + exponent[last] * math.log(2.0))


@_jit
def _hard_forward(n, m, band, start, packed, left):
    """As _soft_forward, of the best path; ties go to (i-1, j-1), then to (i-1, j)."""
    width = n + 2
    left[:] = 0
    total = np.full(3 * width, _UNREACHABLE)
    total[width] = 0.0
    for d in range(n + m - 1):
        d0, d1, d2 = d % 3 * width, (d + 2) % 3 * width, (d + 1) % 3 * width
        first, stop = _rows(d, n, m, band)
        for i in range(first, stop):
            a, b, c = total[d2 + i], total[d1 + i], total[d1 + i + 1]
            low = a if a <= b else b
            total[d0 + i + 1] = packed[start[d] + i] + (low if low <= c else c)
            packed[start[d] + i] = b < a and b <= c
            if len(left):
                left[start[d] + i] = c < low
        total[d0 + first] = total[d0 + stop + 1] = _UNREACHABLE
    return total[(n + m - 2) % 3 * width + n]


@_jit
def _smallest_gamma(largest, n, m, fraction_bits, exponent_bits):
    """Below it, a cost's exponent is not exact or the sum of a path's overflows."""
    per_gamma = max(2.0 ** (2 - fraction_bits), (n + m) * 2.0 ** (3 - exponent_bits))
    return math.log2(math.e) * largest * per_gamma


@_jit
def _forward(n, m, band, gamma, largest, start, packed, left):
    """Soft-DTW of packed costs; weights replace them and fill left, if that has room."""
    one_path = min(n, m) == 1 or band == 0  # whose cost may be less than gamma's rounding
    if gamma == 0 or one_path:
        return _hard_forward(n, m, band, start, packed, left)
    if packed.itemsize == 4 and gamma >= max(_smallest_gamma(largest, n, m, 23, 32), 1e-30):
        return _soft_forward(n, m, band, gamma, start, packed, left)
    # A gamma of less than 2^-50 of the costs is lost in their sums' rounding, too.
    gamma = max(gamma, _smallest_gamma(largest, n, m, 52, 64), 1e-300)
    wide, wide_left = packed.astype(np.float64), left.astype(np.float64)
    value = _soft_forward(n, m, band, gamma, start, wide, wide_left)
    packed[:], left[:] = wide, wide_left
    return value


@_jit
def _flow(expected, rows, packed, left, here, size):
    """Alignment of consecutive cells of a diagonal from the two diagonals after it."""
    (d2, d1, d0), (here2, here1) = rows, here
    next_, one, zero = np.uintp(1), np.float32(1), np.float32(0)
    for k in range(size):
        diagonal2 = one - packed[here2 + k + next_] - left[here2 + k + next_]
        diagonal2 = diagonal2 if diagonal2 > zero else zero
        expected[d0 + k] = (
            expected[d1 + k + next_] * packed[here1 + k + next_]
            + expected[d1 + k] * left[here1 + k]
            + expected[d2 + k + next_] * diagonal2
        )


@_jit
def _backward(n, m, band, start, packed, left):
    """Replace the weights in packed by the alignment."""
    width = n + 2 + _LANES
    expected = np.zeros(3 * width, packed.dtype)
    last = n + m - 2
    expected[last % 3 * width + n] = 1
    for d in range(last - 1, -3, -1):
        d0, d1, d2 = d % 3 * width, (d + 1) % 3 * width, (d + 2) % 3 * width
        if d >= 0:
            first, stop = _rows(d, n, m, band)
            _flow(
                expected,
                (np.uintp(d2 + first + 1), np.uintp(d1 + first + 1), np.uintp(d0 + first + 1)),
                packed,
                left,
                (np.uintp(start[d + 2] + first), np.uintp(start[d + 1] + first)),
                np.uintp(_padded(stop - first)),
            )
            expected[d0 + first] = expected[d0 + stop + 1] = 0
        if d + 2 <= last:
            first, stop = _rows(d + 2, n, m, band)
            source, target = np.uintp(d2 + first + 1), np.uintp(start[d + 2] + first)
            for k in range(np.uintp(stop - first)):
                packed[target + k] = expected[source + k]


@_jit
def _utterance(cost, alignment, n, m, gamma, band, start, packed, left):
    """Soft-DTW of cost[:n, :m]; its alignment goes to the whole of alignment, if left has room."""
    size = _layout(n, m, band, start)
    keep = len(left) > 0
    packed, left = packed[:size], left[: size if keep else 0]
    largest = _pack(cost, start, n, m, band, packed)
    if largest < np.inf:
        left[:_LANES] = 0
        left[-2 * _LANES :] = 0
        value = _forward(n, m, band, gamma, largest, start, packed, left)
        if keep:
            _backward(n, m, band, start, packed, left)
    else:
        value = np.nan
        packed[:] = np.nan
    if keep:
        _unpack(packed, start, n, m, band, alignment)
    return value


@_jit
def _room(lengths, band):
    """Size of packed for the largest utterance."""
    room = 0
    for n, m in lengths:
        room = max(room, _layout(n, m, band, np.empty(n + m + 1, np.int64)))
    return room


@_jit
def _share(cost, alignment, lengths, gamma, band, utterances, packed, left, value):
    """One thread's utterances, one after the other in the same memory."""
    start = np.empty(cost.shape[1] + cost.shape[2] + 1, np.int64)
    for b in utterances:
        n, m = lengths[b]
        value[b] = _utterance(cost[b], alignment[b], n, m, gamma, band, start, packed, left)


def align(
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float,
    bandwidth: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`, on as many threads as torch uses."""
    cost = cost.contiguous().numpy()
    value = np.empty(len(cost), cost.dtype)
    lengths = torch.stack([x_lengths, y_lengths], dim=1)
    band = max(cost.shape[1:]) if bandwidth is None else bandwidth
    cells = lengths.prod(dim=1)
    longest_first = torch.argsort(cells, descending=True, stable=True).numpy()
    work = 1 + int(cells.sum()) // _CELLS_A_THREAD
    threads = min(torch.get_num_threads(), max(len(cost), 1), work)
    lengths = lengths.numpy()
    # numpy's memory, unlike torch's or numba's, asks for huge pages.
    room = _room(lengths, band)
    packed = np.empty((threads, room), cost.dtype)
    left = np.empty((threads, room if with_alignment else 0), cost.dtype)
    alignment = np.empty_like(cost) if with_alignment else cost

    def share(thread: int) -> None:
        utterances = longest_first[thread::threads]
        _share(
            cost,
            alignment,
            lengths,
            float(gamma),
            band,
            utterances,
            packed[thread],
            left[thread],
            value,
        )

    # Not numba's own threads: they share an OpenMP runtime with torch and change its settings.
    with ThreadPoolExecutor(threads) as pool:
        others = [pool.submit(share, thread) for thread in range(1, threads)]
        share(0)
        for other in others:
            other.result()
    return torch.from_numpy(value), torch.from_numpy(alignment) if with_alignment else None
