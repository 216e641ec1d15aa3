"""Soft-DTW on the CPU: compiled by numba, on several threads, with SIMD along anti-diagonals.

Cell (i, j) of the alignment matrix is on anti-diagonal d = i + j and needs cells of diagonals
d - 1 and d - 2 only. So the cells of one diagonal are independent, and SIMD computes several at
once. For that, the cost is first packed, diagonal by diagonal. An example of 3 by 4 frames with a
fixed band of 2; a cell is named by its row and column, and cell 03 is outside the band::

         cost                packed                     first pass     second pass
                       d=0   00 ---- padding ----    |                ^
    00  01  02   .     d=1   01 10 -- padding ---    | p: first half  |
    10  11  12  13     d=2   02 11 20 - padding -    v                |
    20  21  22  23                                      they meet       alignment
                       d=3   12 21 -- padding ---    ^                |
                       d=4   13 22 -- padding ---    | p: second half |
                       d=5   23 ---- padding ----    |                v

Cell (i, d - i) is packed[START of d + i], for i from FIRST of d to before STOP of d: the three
columns of layout. Only cells inside the lengths and the band are packed. Each diagonal is padded to
whole SIMD vectors. The cost itself is stored in blocks of rows, of which a band has only some
columns (see :mod:`posinv.softdtw.band`).

Soft-DTW is the logarithm of a sum over paths, ``r = -gamma log p`` with

    p[i, j] = exp(-c[i, j] / gamma) (p[i-1, j-1] + p[i-1, j] + p[i, j-1]).

The kernels accumulate p, as m 2^e with an integer exponent e for each cell. This takes one
exponential a cell and no logarithm, and nothing overflows. The rounding error is relative to p. If
r were accumulated, the error would be relative to r / gamma: in float32, at 4,000 frames and a
gamma of 0.01, it would change the weights of the predecessors by several per cent. If float32 costs
are so large that an exponent needs more than 32 bits, they are computed in float64.

First pass (_accumulate): it begins at both ends, so that two threads can share one alignment. In
the first half, p sums the paths from the first cell; in the second half, the paths to the last
cell, by the same equation with i + 1 and j + 1. Here the "predecessors" of a cell are the cells
after it. A cell's three predecessors have weights, their shares of its sum. The pass writes two of
them, one over the packed cost and one to the array `left` (the three weights sum to one). An empty
`left` means that no alignment is asked for.

The two halves together give the value, and the alignment of the two diagonals in the middle
(_meet).

Second pass (_outwards): from the middle to both ends. A diagonal's alignment follows from the two
diagonals nearer to the middle and their weights. It is written over the weights.

A thread that is alone computes the two halves one after the other, so results do not depend on the
number of threads.

LLVM vectorises a loop only if it can prove that the loop's arrays do not overlap, and it gives up
if there are more than eight pairs of arrays to compare. Loops are therefore short. They share one
scratch array, whose parts are at constant distances.
"""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Timer

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from posinv.softdtw.band import ROWS, Band

_log = logging.getLogger(__name__)

_UNREACHABLE = 1e300  # for gamma = 0, the accumulated cost outside the band
_LANES = 16  # diagonals are padded to a multiple: a cache line, the widest vector of float32
_BLOCK = 512  # cells of a diagonal computed together: scratch and diagonals stay in the L1 cache
_PART = _BLOCK + 16  # distance of two parts of the scratch, in cells; not a multiple of a page
_EDGE = 2  # columns before row 0 in the arrays that hold three diagonals
_START, _FIRST, _STOP = range(3)  # columns of layout

_SILENT_SECONDS = 3.0  # a first call that takes longer logs that it compiles

_CELLS_A_THREAD = 150_000  # fewer cells take less time than to start a thread
_CELLS_A_HALF = 300_000  # fewer cells take less time than two threads' waiting for each other


def _probe() -> None:
    pass


def _can_cache() -> bool:
    """Whether numba finds a folder for compiled code; it looks for one when it wraps a function."""
    try:
        numba.njit(cache=True)(_probe)
    except RuntimeError:
        _log.warning(
            "soft-DTW is compiled again in every process: numba can write neither beside %s nor "
            "in the home folder; set NUMBA_CACHE_DIR to a folder that can be written",
            __file__,
        )
        return False
    return True


_jit = numba.njit(cache=_can_cache(), nogil=True, error_model="numpy", fastmath={"contract"})

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
    """An uninitialised array as long as x, of integers as wide as its floats."""
    if x.dtype == types.float32:
        return lambda x: np.empty(len(x), np.int32)
    return lambda x: np.empty(len(x), np.int64)


@_jit
def _padded(size):
    """Size rounded up to whole vectors."""
    return -(-size // _LANES) * _LANES


@_jit
def _columns(i, m, line):
    """First column and one past the last column of row i inside the lengths and the band."""
    p, q, reach = line
    return max(0, -((reach - 2 * i * q) // (2 * p))), min(m - 1, (2 * i * q + reach) // (2 * p)) + 1


@_jit
def _layout(n, m, line, layout):
    """Fill layout, (n + m + 1, 3) (see the module's diagram); return the size of packed.

    There is padding before, between and after the diagonals. Loops read it, to no effect.
    """
    p, q, reach = line
    last, offset = n + m - 2, _LANES
    for d in range(n + m + 1):
        e = min(d, last)
        first = max(0, e - m + 1, -((reach - 2 * e * p) // (2 * (p + q))))
        stop = min(n - 1, e, (2 * e * p + reach) // (2 * (p + q))) + 1
        layout[d, _START] = offset - first
        layout[d, _FIRST] = first
        layout[d, _STOP] = stop
        if d <= last:
            offset += _padded(stop - first)
    return offset + 2 * _LANES


@_jit
def _largest(row, largest):
    """Bits of the largest magnitude: as integers they have the floats' order, NaN the highest."""
    for k in range(np.uintp(len(row))):
        bits = _reinterpret(abs(row[k]))
        largest = bits if bits > largest else largest
    return largest


@_jit
def _pack(cost, columns, layout, n, m, line, rows, packed):
    """Copy rows of the cost to packed; return their largest magnitude, which may be NaN.

    columns has the first column that is stored of each block of rows. The call that has row 0 also
    fills the padding.
    """
    flat, width, step = cost.reshape(-1), cost.shape[1], np.uintp(cost.shape[1] - 1)
    begin, end = rows
    if begin == 0:
        packed[:_LANES] = 0
        packed[-2 * _LANES :] = 0
        for d in range(n + m - 1):
            start, first, stop = layout[d, _START], layout[d, _FIRST], layout[d, _STOP]
            packed[start + stop : start + first + _padded(stop - first)] = 0
    largest = _reinterpret(abs(cost[0, 0]))
    for top in range(begin, end, _LANES):
        bottom = min(top + _LANES, end)
        shift = columns[top // ROWS]
        for i in range(top, bottom):
            left, right = _columns(i, m, line)
            largest = _largest(cost[i, left - shift : right - shift], largest)
        left, right = _columns(top, m, line)[0], _columns(bottom - 1, m, line)[1]
        for d in range(top + left, bottom - 1 + right):
            start = layout[d, _START]
            first, stop = max(layout[d, _FIRST], top), min(layout[d, _STOP], bottom)
            source = top * width - shift + d - top  # of row top, were its column stored
            if stop - first == _LANES:
                here, target = flat[source:], packed[start + top :]
                for r in range(_LANES):
                    target[np.uintp(r)] = here[np.uintp(r) * step]
            else:
                for i in range(first, stop):
                    packed[start + i] = cost[i, d - i - shift]
    return _reinterpret(largest)


@_jit
def _unpack(packed, columns, layout, n, m, line, rows, out):
    """Copy packed to rows of out, with zeros outside the lengths and the band."""
    flat, width, step = out.reshape(-1), out.shape[1], np.uintp(out.shape[1] - 1)
    begin, end = rows
    if begin == 0:
        out[n:] = 0
    for top in range(begin, end, _LANES):
        bottom = min(top + _LANES, end)
        shift = columns[top // ROWS]
        for i in range(top, bottom):
            left, right = _columns(i, m, line)
            out[i, : left - shift] = 0
            out[i, right - shift :] = 0
        left, right = _columns(top, m, line)[0], _columns(bottom - 1, m, line)[1]
        for d in range(top + left, bottom - 1 + right):
            start = layout[d, _START]
            first, stop = max(layout[d, _FIRST], top), min(layout[d, _STOP], bottom)
            if stop - first == _LANES:
                source, target = packed[start + top :], flat[top * width - shift + d - top :]
                for r in range(_LANES):
                    target[np.uintp(r) * step] = source[np.uintp(r)]
            else:
                for i in range(first, stop):
                    out[i, d - i - shift] = packed[start + i]


def _soft_step(mantissa, exponent, rows, packed, left, here, size, real, whole, scale):
    raise NotImplementedError("compiled code only")


@overload(_soft_step, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def _soft_step_overload(mantissa, exponent, rows, packed, left, here, size, real, whole, scale):
    """p of consecutive cells of diagonal d and, unless left is empty, their predecessors' weights.

    rows is (d2, d1, d0): cell k of diagonal d has its p at d0 + k in mantissa and exponent, and the
    p of its predecessors at::

                        first half    second half    weight goes to
        d2 + k          (i-1, j-1)    (i+1, j+1)     (one minus the other two)
        d1 + k          (i-1, j)      (i, j+1)       packed[here + k], over the cost of cell k
        d1 + k + 1      (i, j-1)      (i+1, j)       left[here + k]

    real and whole are scratch. scale is log2(e) / gamma in two parts: its value and its rounding
    error. Indices are unsigned, so that numba does not test for negative ones.
    """
    if scale.dtype == types.float32:
        floating, integer, fraction_bits, reach = np.float32, np.int32, np.int32(23), np.int32(100)
    else:
        floating, integer, fraction_bits, reach = np.float64, np.int64, np.int64(52), np.int64(1000)
    none = integer(0)
    fraction = integer(2 ** int(fraction_bits) - 1)
    one_bits = floating(1).view(integer)
    rounding = floating(1.5 * 2 ** int(fraction_bits))  # a sum with it has an integer in low bits
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
def _three_diagonals(n):
    """Size of an array for three diagonals: d is in the third d % 3, its row i at i + _EDGE."""
    return 3 * (n + 2 * _EDGE + _LANES)


@_jit
def _accumulate(n, m, gamma, layout, packed, left, ahead, mantissa, exponent):
    """p of the first half (ahead) or of the second half.

    Afterwards mantissa and exponent hold the two diagonals nearest to the middle. Unless left is
    empty, weights have replaced the packed costs and filled left.
    """
    width = len(mantissa) // 3
    mantissa[:] = 1
    unreachable = -1 << (8 * packed.itemsize - 2)
    exponent[:] = unreachable
    real = np.empty(4 * _PART, packed.dtype)
    whole = _integers_like(real)
    scale = np.empty(2, packed.dtype)
    scale[0] = math.log2(math.e) / gamma
    scale[1] = math.log2(math.e) / gamma - scale[0]
    last = n + m - 2
    if ahead:
        d, end, step, shift = 0, last // 2 + 1, 1, 0
        exponent[-2 % 3 * width + _EDGE - 1] = 0  # p = 1 before (0, 0), on diagonal -2
    else:
        d, end, step, shift = last, last // 2, -1, 1
        exponent[(last + 2) % 3 * width + _EDGE + n] = 0
    while d != end:
        d0, d1, d2 = d % 3 * width, (d - step) % 3 * width, (d - 2 * step) % 3 * width
        start, first, stop = layout[d, _START], layout[d, _FIRST], layout[d, _STOP]
        for i in range(first, stop, _BLOCK):
            column = i + _EDGE
            _soft_step(
                mantissa,
                exponent,
                (
                    np.uintp(d2 + column - 1 + 2 * shift),
                    np.uintp(d1 + column - 1 + shift),
                    np.uintp(d0 + column),
                ),
                packed,
                left,
                np.uintp(start + i),
                np.uintp(_padded(min(stop - i, _BLOCK))),
                real,
                whole,
                (scale[0], scale[1]),
            )
        exponent[d0 + first + _EDGE - 1] = exponent[d0 + stop + _EDGE] = unreachable
        d += step


@_jit
def _crossing(mantissa, exponent, a, other_mantissa, other_exponent, b, top):
    """2^-top times the p of all paths through cell a of the first half and cell b of the second.

    It is 0 if there are none.
    """
    unreachable = -1 << (8 * mantissa.itemsize - 3)
    if exponent[a] < unreachable or other_exponent[b] < unreachable:
        return 0.0
    power = np.int64(exponent[a]) + np.int64(other_exponent[b]) - top
    return np.float64(mantissa[a]) * np.float64(other_mantissa[b]) * 2.0 ** np.float64(power)


@_jit
def _meet(n, m, gamma, layout, ahead, back, expected, jumps, expected_back, jumps_back):
    """r of the last cell, from (mantissa, exponent) of the first and of the second half.

    The other arrays, unless they are empty, get alignments: expected that of the last diagonal of
    the first half, expected_back that of the first one of the second half. A path can jump over
    either by a step to (i+1, j+1). jumps gets what such paths bring to the diagonal before
    expected's, jumps_back what they bring to the diagonal after expected_back's.
    """
    (mantissa, exponent), (mantissa_back, exponent_back) = ahead, back
    width = len(mantissa) // 3
    middle = (n + m - 2) // 2
    before, here = (middle - 1) % 3 * width + _EDGE, middle % 3 * width + _EDGE
    after, beyond = (middle + 1) % 3 * width + _EDGE, (middle + 2) % 3 * width + _EDGE
    top = np.int64(-1) << 62
    for i in range(layout[middle, _FIRST], layout[middle, _STOP]):
        best = max(exponent_back[after + i], exponent_back[after + i + 1])
        best = max(best, exponent_back[beyond + i + 1])
        top = max(top, np.int64(exponent[here + i]) + np.int64(best))
    for i in range(layout[middle - 1, _FIRST], layout[middle - 1, _STOP]):
        best = exponent_back[after + i + 1]
        top = max(top, np.int64(exponent[before + i]) + np.int64(best))
    total = 0.0
    for keep in (False, True):
        if keep and not len(expected):
            break
        if keep:
            expected[:] = 0
            expected_back[:] = 0
            jumps[:] = 0
            jumps_back[:] = 0
        for i in range(layout[middle, _FIRST], layout[middle, _STOP]):
            a = here + i
            right = _crossing(mantissa, exponent, a, mantissa_back, exponent_back, after + i, top)
            down = _crossing(
                mantissa, exponent, a, mantissa_back, exponent_back, after + i + 1, top
            )
            over = _crossing(
                mantissa, exponent, a, mantissa_back, exponent_back, beyond + i + 1, top
            )
            if keep:
                expected[a] = (right + down + over) / total
                expected_back[after + i] += right / total
                expected_back[after + i + 1] += down / total
                jumps_back[_EDGE + i + 1] = over / total
            else:
                total += right + down + over
        for i in range(layout[middle - 1, _FIRST], layout[middle - 1, _STOP]):
            over = _crossing(
                mantissa, exponent, before + i, mantissa_back, exponent_back, after + i + 1, top
            )
            if keep:
                jumps[_EDGE + i] = over / total
                expected_back[after + i + 1] += over / total
            else:
                total += over
    return -gamma * (math.log(total) + top * math.log(2.0))


@_jit
def _hard_forward(n, m, layout, packed, left):
    """r of the best path. Weights, 0 or 1, replace the packed costs and fill left.

    Of equally good predecessors, (i-1, j-1) is taken before (i-1, j), and that before (i, j-1).
    """
    width = n + 2
    left[:] = 0
    total = np.full(3 * width, _UNREACHABLE)
    total[width] = 0.0
    for d in range(n + m - 1):
        d0, d1, d2 = d % 3 * width, (d + 2) % 3 * width, (d + 1) % 3 * width
        start, first, stop = layout[d, _START], layout[d, _FIRST], layout[d, _STOP]
        for i in range(first, stop):
            a, b, c = total[d2 + i], total[d1 + i], total[d1 + i + 1]
            low = a if a <= b else b
            total[d0 + i + 1] = packed[start + i] + (low if low <= c else c)
            packed[start + i] = b < a and b <= c
            if len(left):
                left[start + i] = c < low
        total[d0 + first] = total[d0 + stop + 1] = _UNREACHABLE
    return total[(n + m - 2) % 3 * width + n]


@_jit
def _smallest_gamma(largest, n, m, fraction_bits, exponent_bits):
    """The least gamma at which costs' exponents are exact and a path's sum does not overflow."""
    per_gamma = max(2.0 ** (2 - fraction_bits), (n + m) * 2.0 ** (3 - exponent_bits))
    return math.log2(math.e) * largest * per_gamma


@_jit
def _flow(expected, rows, packed, left, here, size):
    """Alignment of consecutive cells of a diagonal, from the two diagonals nearer to the middle.

    rows says where in expected the three diagonals begin, here where the weights of the two do.
    """
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
def _outwards(n, m, layout, packed, left, border, step, given, jumps):
    """Replace weights by the alignment, from diagonal border to the first (step -1) or last (1).

    given is the alignment of diagonal border; jumps is added to that of the next one (see _meet).
    """
    expected = given.copy()  # a new array: LLVM knows that it overlaps with no other
    width = len(expected) // 3
    last = n + m - 2
    shift = 0 if step < 0 else 1
    d = border
    while 0 <= d - 2 * step <= last or d == border or d - step == border:
        d0, d1, d2 = d % 3 * width, (d - step) % 3 * width, (d - 2 * step) % 3 * width
        if d != border and 0 <= d <= last:
            first, stop = layout[d, _FIRST], layout[d, _STOP]
            column = first + _EDGE
            # Beyond the border, expected is zero: any diagonal's weights will do.
            from2 = d - 2 * step if d - step != border else border
            _flow(
                expected,
                (
                    np.uintp(d2 + column - 2 * shift),
                    np.uintp(d1 + column - shift),
                    np.uintp(d0 + column),
                ),
                packed,
                left,
                (
                    np.uintp(layout[from2, _START] + first - 2 * shift),
                    np.uintp(layout[d - step, _START] + first - shift),
                ),
                np.uintp(_padded(stop - first)),
            )
            if d - step == border:
                for i in range(first, stop):
                    expected[d0 + i + _EDGE] += jumps[i + _EDGE]
            expected[d0 + column - 1] = expected[d0 + stop + _EDGE] = 0
        if d != border and d - step != border:
            start, first, stop = (
                layout[d - 2 * step, _START],
                layout[d - 2 * step, _FIRST],
                layout[d - 2 * step, _STOP],
            )
            source = np.uintp(d2 + first + _EDGE)
            target = np.uintp(start + first)
            for k in range(np.uintp(stop - first)):
                packed[target + k] = expected[source + k]
        d += step


@_jit
def _hard(n, m, layout, packed, left):
    """DTW of packed costs, which the best path replaces unless left is empty."""
    value = _hard_forward(n, m, layout, packed, left)
    if len(left):
        expected = np.zeros(_three_diagonals(n), packed.dtype)
        last = n + m - 2
        expected[last % 3 * (len(expected) // 3) + n - 1 + _EDGE] = 1
        _outwards(n, m, layout, packed, left, last, -1, expected, np.zeros_like(expected))
    return value


@_jit
def _soft(n, m, gamma, layout, packed, left):
    """Soft-DTW of packed costs, which the alignment replaces unless left is empty."""
    size = _three_diagonals(n)
    mantissa, back = np.empty(size, packed.dtype), np.empty(size, packed.dtype)
    exponent, exponent_back = _integers_like(mantissa), _integers_like(mantissa)
    _accumulate(n, m, gamma, layout, packed, left, True, mantissa, exponent)
    _accumulate(n, m, gamma, layout, packed, left, False, back, exponent_back)
    arrays = np.empty((4, size if len(left) else 0), packed.dtype)
    expected, jumps, expected_back, jumps_back = arrays
    value = _meet(
        *(n, m, gamma, layout, (mantissa, exponent), (back, exponent_back)),
        *(expected, jumps, expected_back, jumps_back),
    )
    if len(left):
        middle = (n + m - 2) // 2
        _outwards(n, m, layout, packed, left, middle, -1, expected, jumps)
        _outwards(n, m, layout, packed, left, middle + 1, 1, expected_back, jumps_back)
    return value


@_jit
def _is_hard(n, m, line, gamma):
    """Whether gamma is 0, or there is a single path: its cost may be less than gamma's rounding."""
    p, q, reach = line
    return gamma == 0 or min(n, m) == 1 or (p == q and reach < 2 * p)


@_jit
def _fits_float32(n, m, gamma, largest):
    return gamma >= max(_smallest_gamma(largest, n, m, 23, 32), 1e-30)


@_jit
def _solve(n, m, line, gamma, largest, layout, packed, left):
    """Soft-DTW of packed costs, which the alignment replaces unless left is empty."""
    if not largest < np.inf:
        packed[:] = np.nan
        return np.nan
    left[:_LANES] = 0
    left[-2 * _LANES :] = 0
    if _is_hard(n, m, line, gamma):
        return _hard(n, m, layout, packed, left)
    if packed.itemsize == 4 and _fits_float32(n, m, gamma, largest):
        return _soft(n, m, gamma, layout, packed, left)
    # A smaller gamma has no effect: it is less than the rounding error of the sums of costs.
    gamma = max(gamma, _smallest_gamma(largest, n, m, 52, 64), 1e-300)
    wide, wide_left = packed.astype(np.float64), left.astype(np.float64)
    value = _soft(n, m, gamma, layout, wide, wide_left)
    packed[:] = wide
    return value


@_jit
def _utterance(cost, alignment, columns, n, m, gamma, line, layout, packed, left):
    """Soft-DTW of cost[:n, :m]; fills alignment, zeros beyond n and m too, unless left is empty."""
    size = _layout(n, m, line, layout)
    keep = len(left) > 0
    packed, left = packed[:size], left[: size if keep else 0]
    largest = _pack(cost, columns, layout, n, m, line, (0, n), packed)
    value = _solve(n, m, line, gamma, largest, layout, packed, left)
    if keep:
        _unpack(packed, columns, layout, n, m, line, (0, n), alignment)
    return value


@_jit
def _line(lines, b):
    return lines[b, 0], lines[b, 1], lines[b, 2]


@_jit
def _room(lengths, lines):
    """Size of packed for the largest utterance."""
    room = 0
    for b in range(len(lengths)):
        n, m = lengths[b]
        room = max(room, _layout(n, m, _line(lines, b), np.empty((n + m + 1, 3), np.int64)))
    return room


@_jit
def _share(costs, alignments, columns, lengths, gamma, lines, utterances, packed, left, value):
    """Soft-DTW of one thread's utterances, one after the other in the same memory."""
    longest = 0
    for b in utterances:
        longest = max(longest, lengths[b].sum())
    layout = np.empty((longest + 1, 3), np.int64)
    for b in utterances:
        n, m = lengths[b]
        value[b] = _utterance(
            *(costs[b], alignments[b], columns[b], n, m, gamma, _line(lines, b)),
            *(layout, packed, left),
        )


def _in_halves(
    cost: np.ndarray,
    alignment: np.ndarray,
    keep: bool,
    columns: np.ndarray,
    n: int,
    m: int,
    gamma: float,
    line: tuple[int, int, int],
    pool: ThreadPoolExecutor,
) -> float:
    """Compute the same as _utterance with two threads: the calling one, and one of the pool."""

    def both(work: Callable[[int], object]) -> tuple:
        other = pool.submit(work, 1)
        return work(0), other.result()

    layout = np.empty((n + m + 1, 3), np.int64)
    room = _layout(n, m, line, layout)
    packed = np.empty(room, cost.dtype)
    left = np.empty(room if keep else 0, cost.dtype)
    middle = n // 2 // ROWS * ROWS
    rows = (0, middle), (middle, n)
    largest = np.maximum(*both(lambda k: _pack(cost, columns, layout, n, m, line, rows[k], packed)))
    if (
        cost.dtype == np.float32
        and largest < np.inf
        and not _is_hard(n, m, line, gamma)
        and _fits_float32(n, m, gamma, largest)
    ):
        left[:_LANES] = left[-2 * _LANES :] = 0
        size = _three_diagonals(n)
        states = [(np.empty(size, np.float32), np.empty(size, np.int32)) for _ in range(2)]
        both(lambda k: _accumulate(n, m, gamma, layout, packed, left, k == 0, *states[k]))
        given = np.empty((2, 2, size if keep else 0), np.float32)
        value = _meet(n, m, gamma, layout, *states, *given.reshape(4, -1))
        if keep:
            border = (n + m - 2) // 2
            both(
                lambda k: _outwards(*(n, m, layout, packed, left, border + k, 2 * k - 1, *given[k]))
            )
    else:
        value = _solve(n, m, line, gamma, largest, layout, packed, left)
    if keep:
        both(lambda k: _unpack(packed, columns, layout, n, m, line, rows[k], alignment))
    return value


_compiled: set[tuple] = set()  # the variants that have run in this process


@contextmanager
def _telling_of_compilation(*variant: object) -> Iterator[None]:
    """Log that numba compiles, if the first call of a variant takes long."""
    if variant in _compiled:
        yield
        return
    message = "compiling soft-DTW for this processor: a minute on a slow machine, then kept"
    timer = Timer(_SILENT_SECONDS, _log.warning, (message,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    _compiled.add(variant)


def align(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`, on as many threads as torch uses."""
    costs = cost.contiguous().numpy()
    value = np.empty(len(costs), costs.dtype)
    lengths = torch.stack([band.x_lengths, band.y_lengths], dim=1)
    sizes = band.x_lengths * band.y_lengths.clamp(max=band.width)
    longest_first = torch.argsort(sizes, descending=True, stable=True).numpy()
    available, cells = torch.get_num_threads(), int(sizes.sum())
    threads = min(available, 1 + cells // _CELLS_A_THREAD)
    in_halves = min(available, cells // _CELLS_A_HALF) >= 2 * len(costs)
    workers = max(min(threads // 2 if in_halves else threads, len(costs)), 1)
    n_and_m, lines = lengths.numpy(), np.ascontiguousarray(band.lines.numpy())
    columns = np.ascontiguousarray(band.first.numpy())
    # Allocated by numpy, which asks for huge pages; torch and numba do not.
    alignment = np.empty_like(costs) if with_alignment else costs
    room = 0 if in_halves else _room(n_and_m, lines)
    packed = np.empty((workers, room), costs.dtype)
    left = np.empty((workers, room if with_alignment else 0), costs.dtype)

    def share(worker: int, pool: ThreadPoolExecutor) -> None:
        utterances = longest_first[worker::workers]
        if in_halves:
            for b in utterances:
                value[b] = _in_halves(
                    *(costs[b], alignment[b], with_alignment, columns[b], n_and_m[b, 0]),
                    *(n_and_m[b, 1], gamma, (lines[b, 0], lines[b, 1], lines[b, 2]), pool),
                )
        else:
            _share(
                *(costs, alignment, columns, n_and_m, gamma, lines, utterances),
                *(packed[worker], left[worker], value),
            )

    # Not numba's own threads: they share an OpenMP runtime with torch and change its settings.
    with (
        _telling_of_compilation(costs.dtype, in_halves),
        ThreadPoolExecutor(2 * workers if in_halves else workers) as pool,
    ):
        others = [pool.submit(share, worker, pool) for worker in range(1, workers)]
        share(0, pool)
        for other in others:
            other.result()
    return torch.from_numpy(value), torch.from_numpy(alignment) if with_alignment else None
