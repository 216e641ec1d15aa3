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

import ctypes
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Timer
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from posinv.softdtw.band import ROWS, Band
from posinv.softdtw.memory import empty, empty_like
from posinv.softdtw.threads import run

_log = logging.getLogger(__name__)

_UNREACHABLE = 1e300  # for gamma = 0, the accumulated cost outside the band
_LANES = 16  # diagonals are padded to a multiple: a cache line, the widest vector of float32
_BLOCK = 512  # cells of a diagonal computed together: scratch and diagonals stay in the L1 cache
_PART = _BLOCK + 16  # distance of two parts of the scratch, in cells; not a multiple of a page
_EDGE = 2  # columns before row 0 in the arrays that hold three diagonals
_START, _FIRST, _STOP = range(3)  # columns of layout

_SILENT_SECONDS = 3.0  # a first call that takes longer logs that it compiles

_CELLS_OF_THREADS = 100_000  # fewer cells take less time than to wake a thread
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


_CAN_CACHE = _can_cache()
_jit = numba.njit(cache=_CAN_CACHE, nogil=True, error_model="numpy", fastmath={"contract"})

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


_TILE = 8  # rows, and diagonals, that are moved together
# Three rounds of shuffles transpose 8 vectors of 8, each one instruction of AVX. They leave columns
# 1 and 2, and 5 and 6, in each other's place.
_ROUNDS = (
    (1, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)


def _transposed(builder: ir.IRBuilder, rows: list) -> list:
    integer = ir.VectorType(ir.IntType(32), _TILE)
    for distance, low, high in _ROUNDS:
        mixed = [None] * _TILE
        for k in range(_TILE):
            if not k & distance:
                pair = rows[k], rows[k + distance]
                mixed[k] = builder.shuffle_vector(*pair, ir.Constant(integer, low))
                mixed[k + distance] = builder.shuffle_vector(*pair, ir.Constant(integer, high))
        rows = mixed
    return [rows[k] for k in (0, 2, 1, 3, 4, 6, 5, 7)]


def _mover(to_diagonals: bool) -> Callable:
    def move(typing_context, flat, place, step, packed, layout, d, top):
        """Copy rows top to top + 7 of diagonals d to d + 7 between packed and rows of a cost.

        Cell (top, d - top) is flat[place], and the next one of the same diagonal step further. In
        vectors, as one cell at a time takes as long as the recursions.
        """

        def generate(context, builder, signature, args):
            _, place, step, _, _, d, top = args
            rows_of, diagonals_of, layout_of = (
                context.make_array(signature.args[k])(context, builder, args[k]).data
                for k in (0, 3, 4)
            )
            element = context.get_data_type(signature.args[0].dtype)
            vector = ir.VectorType(element, _TILE)

            def at(array, index):
                return builder.bitcast(builder.gep(array, [index]), vector.as_pointer())

            rows, diagonals = [], []
            for k in range(_TILE):
                rows.append(at(rows_of, builder.add(place, builder.mul(step, step.type(k)))))
                of_layout = builder.mul(builder.add(d, d.type(k)), d.type(3))
                start = builder.load(builder.gep(layout_of, [of_layout]))
                diagonals.append(at(diagonals_of, builder.add(start, top)))
            sources, targets = (rows, diagonals) if to_diagonals else (diagonals, rows)
            align = context.get_abi_sizeof(element)
            found = [builder.load(source, align=align) for source in sources]
            for value, target in zip(_transposed(builder, found), targets, strict=True):
                builder.store(value, target, align=align)
            return context.get_dummy_value()

        return types.void(
            flat, types.int64, types.int64, packed, layout, *[types.int64] * 2
        ), generate

    return intrinsic(move)


_rows_to_diagonals = _mover(True)
_diagonals_to_rows = _mover(False)


@_jit
def _is_tile(layout, d, end, top, bottom):
    """Whether rows top to bottom of diagonals d to d + 7, before end, are a whole tile."""
    return (
        bottom - top == _TILE
        and d + _TILE <= end
        and layout[d, _STOP] >= bottom
        and layout[d + _TILE - 1, _FIRST] <= top
    )


@_jit
def _pack(cost, columns, layout, n, m, line, rows, packed):
    """Copy rows of the cost to packed; return their largest magnitude, which may be NaN.

    columns has the first column that is stored of each block of rows. The call that has row 0 also
    fills the padding.
    """
    flat, width = cost.reshape(-1), cost.shape[1]
    begin, end = rows
    if begin == 0:
        packed[:_LANES] = 0
        packed[-2 * _LANES :] = 0
        for d in range(n + m - 1):
            start, first, stop = layout[d, _START], layout[d, _FIRST], layout[d, _STOP]
            packed[start + stop : start + first + _padded(stop - first)] = 0
    largest = _reinterpret(abs(cost[0, 0]))
    for top in range(begin, end, _TILE):
        bottom = min(top + _TILE, end)
        shift = columns[top // ROWS]
        for i in range(top, bottom):
            left, right = _columns(i, m, line)
            largest = _largest(cost[i, left - shift : right - shift], largest)
        d, last = top + _columns(top, m, line)[0], bottom - 1 + _columns(bottom - 1, m, line)[1]
        while d < last:
            if _is_tile(layout, d, last, top, bottom):
                place = top * width - shift + d - top  # of row top, were its column stored
                _rows_to_diagonals(flat, place, width - 1, packed, layout, d, top)
                d += _TILE
                continue
            for i in range(max(layout[d, _FIRST], top), min(layout[d, _STOP], bottom)):
                packed[layout[d, _START] + i] = cost[i, d - i - shift]
            d += 1
    return _reinterpret(largest)


@_jit
def _unpack(packed, columns, layout, n, m, line, rows, out):
    """Copy packed to rows of out, with zeros outside the lengths and the band."""
    flat, width = out.reshape(-1), out.shape[1]
    begin, end = rows
    if begin == 0:
        out[n:] = 0
    for top in range(begin, end, _TILE):
        bottom = min(top + _TILE, end)
        shift = columns[top // ROWS]
        for i in range(top, bottom):
            left, right = _columns(i, m, line)
            out[i, : left - shift] = 0
            out[i, right - shift :] = 0
        d, last = top + _columns(top, m, line)[0], bottom - 1 + _columns(bottom - 1, m, line)[1]
        while d < last:
            if _is_tile(layout, d, last, top, bottom):
                place = top * width - shift + d - top
                _diagonals_to_rows(flat, place, width - 1, packed, layout, d, top)
                d += _TILE
                continue
            for i in range(max(layout[d, _FIRST], top), min(layout[d, _STOP], bottom)):
                out[i, d - i - shift] = packed[layout[d, _START] + i]
            d += 1


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
    if power < -1000:
        return 0.0
    two_to_the_power = _reinterpret((power + 1023) << 52)
    return np.float64(mantissa[a]) * np.float64(other_mantissa[b]) * two_to_the_power


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


# ------------------------------------------------------------------------- what threads do together
# A job is one batch: the sizes and addresses of its arrays. Its tasks are done in phases: threads
# take the tasks of a phase one after the other, and a phase begins when the one before has ended.
_WHOLE, _PACK, _ACCUMULATE, _MEET, _OUTWARDS, _UNPACK, _SCALE = range(7)
_FLOATING = {torch.float32: np.float32, torch.float64: np.float64}
_WHOLE_NUMBER = {torch.float32: torch.int32, torch.float64: torch.int64}
_ARRAYS = (
    *("counters", "costs", "alignments", "columns", "x_lengths", "y_lengths", "lines", "order"),
    *("values", "layouts", "cells", "packed", "left", "largest", "mantissas", "exponents"),
    "borders",
)
_SIZES = ("phase", "tasks", "B", "N", "width", "blocks", "keep", "rows", "room", "longest", "side")


class _Fields(ctypes.Structure):
    """A job as compiled code sees it: sizes, addresses of arrays, and gamma."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, *_ARRAYS)),
        ("gamma", ctypes.c_double),
    )


@intrinsic
def _pointer(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _take(typing_context, address):
    """Add 1 to the integer at an address; return what it was. No other thread gets the same."""

    def generate(context, builder, signature, args):
        integer = context.get_value_type(types.int64)
        pointer = builder.inttoptr(args[0], integer.as_pointer())
        return builder.atomic_rmw("add", pointer, integer(1), "monotonic")

    return types.int64(types.int64), generate


@_jit
def _fill_layouts(x_lengths, y_lengths, lines, layouts, cells):
    """The layout of each utterance, and the size of packed."""
    for b in range(len(lines)):
        n, m = x_lengths[b], y_lengths[b]
        cells[b] = _layout(n, m, _line(lines, b), layouts[b])


@_jit
def _half(
    phase,
    half,
    cost,
    alignment,
    columns,
    n,
    m,
    gamma,
    line,
    layout,
    packed,
    left,
    largest,
    mantissas,
    exponents,
    borders,
):
    """Do a phase of one half of an utterance that two threads share; _MEET, of both halves."""
    middle = n // 2 // ROWS * ROWS
    rows = (0, middle) if half == 0 else (middle, n)
    if phase == _PACK:
        largest[half] = _pack(cost, columns, layout, n, m, line, rows, packed)
        if half == 0:
            left[:_LANES] = 0
            left[-2 * _LANES :] = 0
        return 0.0
    if phase == _UNPACK:
        _unpack(packed, columns, layout, n, m, line, rows, alignment)
        return 0.0
    most = np.maximum(largest[0], largest[1])  # NaN, if either is
    soft = packed.itemsize == 4 and most < np.inf and not _is_hard(n, m, line, gamma)
    if not (soft and _fits_float32(n, m, gamma, most)):
        return _solve(n, m, line, gamma, most, layout, packed, left) if phase == _MEET else 0.0
    side = _three_diagonals(n)
    mantissa, back = mantissas[0, :side], mantissas[1, :side]
    exponent, exponent_back = exponents[0, :side], exponents[1, :side]
    side *= len(left) > 0
    if phase == _MEET:
        return _meet(
            *(n, m, gamma, layout, (mantissa, exponent), (back, exponent_back)),
            *(borders[0, :side], borders[1, :side], borders[2, :side], borders[3, :side]),
        )
    if phase == _ACCUMULATE:
        if half == 0:
            _accumulate(n, m, gamma, layout, packed, left, True, mantissa, exponent)
        else:
            _accumulate(n, m, gamma, layout, packed, left, False, back, exponent_back)
    else:
        border = (n + m - 2) // 2 + half
        given, jumps = borders[2 * half, :side], borders[2 * half + 1, :side]
        _outwards(n, m, layout, packed, left, border, 2 * half - 1, given, jumps)
    return 0.0


@cache
def _region(floating: type) -> Any:
    """Return the compiled function that each thread runs, for costs of this floating-point type."""
    integer = np.int32 if floating is np.float32 else np.int64

    def work(jobs):
        job = numba.carray(jobs, 1)[0]
        task = _take(job.counters)
        if task >= job.tasks:
            return
        worker = _take(job.counters + 8)
        B, keep, phase, gamma = job.B, job.keep, job.phase, job.gamma
        shape = (B, job.N, job.width)
        costs = numba.carray(_pointer(job.costs), shape, floating)
        alignments = numba.carray(_pointer(job.alignments), shape, floating)
        values = numba.carray(_pointer(job.values), B, floating)
        if phase == _SCALE:
            while task < job.tasks:
                b, top = task % B, task // B * ROWS
                alignments[b, top : top + ROWS] *= values[b]
                task = _take(job.counters)
            return
        columns = numba.carray(_pointer(job.columns), (B, job.blocks), np.int64)
        x_lengths = numba.carray(_pointer(job.x_lengths), B, np.int64)
        y_lengths = numba.carray(_pointer(job.y_lengths), B, np.int64)
        lines = numba.carray(_pointer(job.lines), (B, 3), np.int64)
        order = numba.carray(_pointer(job.order), B, np.int64)
        layouts = numba.carray(_pointer(job.layouts), (job.rows, job.longest + 1, 3), np.int64)
        cells = numba.carray(_pointer(job.cells), job.rows, np.int64)
        packed = numba.carray(_pointer(job.packed), (job.rows, job.room), floating)
        left = numba.carray(_pointer(job.left), (job.rows, job.room * keep), floating)
        largest = numba.carray(_pointer(job.largest), (B, 2), floating)
        mantissas = numba.carray(_pointer(job.mantissas), (B, 2, job.side), floating)
        exponents = numba.carray(_pointer(job.exponents), (B, 2, job.side), integer)
        borders = numba.carray(_pointer(job.borders), (B, 4, job.side * keep), floating)
        while task < job.tasks:
            b = order[task % B]
            n, m = x_lengths[b], y_lengths[b]
            line = _line(lines, b)
            if phase == _WHOLE:
                values[b] = _utterance(
                    *(costs[b], alignments[b], columns[b], n, m, gamma, line),
                    *(layouts[worker], packed[worker], left[worker]),
                )
            else:
                size = cells[b]
                value = _half(
                    *(phase, task // B, costs[b], alignments[b], columns[b], n, m, gamma, line),
                    *(layouts[b], packed[b, :size], left[b, : size * keep], largest[b]),
                    *(mantissas[b], exponents[b], borders[b]),
                )
                if phase == _MEET:
                    values[b] = value
            task = _take(job.counters)

    signature = types.void(types.CPointer(numba.from_dtype(np.dtype(_Fields))))
    return numba.cfunc(signature, cache=_CAN_CACHE, error_model="numpy")(work)


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


class _Job:
    """One batch, whose tasks torch's threads share."""

    def __init__(self, costs: Tensor, threads: int, **fields: float | Tensor) -> None:
        self.region, self.threads = _region(_FLOATING[costs.dtype]), threads
        self.counters = torch.zeros(2, dtype=torch.int64)
        self.arrays = fields | {"costs": costs, "counters": self.counters}  # not to be freed
        values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in self.arrays.items()}
        B, N, width = costs.shape
        self.fields = _Fields(B=B, N=N, width=width, **values)

    def run(self, phase: int, tasks: int) -> None:
        """Do the tasks of a phase."""
        self.counters.zero_()
        self.fields.phase, self.fields.tasks = phase, tasks
        threads = self.threads if tasks > 1 else 1
        run(self.region.address, ctypes.addressof(self.fields), threads)


def align(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`, on as many threads as torch uses."""
    cost = cost.contiguous()
    value = cost.new_empty(len(cost))
    alignment = empty_like(cost) if with_alignment else None
    if len(cost):
        with _telling_of_compilation(cost.dtype):
            _align(cost, cost if alignment is None else alignment, value, band, gamma)
    return value, alignment


def _align(cost: Tensor, alignment: Tensor, value: Tensor, band: Band, gamma: float) -> None:
    """Fill the values and, if it is not the cost, the alignment."""
    keep = alignment is not cost
    B, N, width = cost.shape
    x_lengths, y_lengths, lines, first = (tensor.contiguous() for tensor in band.tensors())
    n, m = x_lengths.numpy(), y_lengths.numpy()
    sizes = n * np.minimum(m, width)
    cells, longest, threads = int(sizes.sum()), int((n + m).max()), torch.get_num_threads()
    in_halves = min(threads, cells // _CELLS_A_HALF) >= 2 * B
    if cells < _CELLS_OF_THREADS:
        threads = 1
    rows = B if in_halves else min(threads, B)
    room = int(sizes.max()) + (longest + 2) * _LANES  # each diagonal is padded by less than that
    side = _three_diagonals(N) if in_halves else 0
    layouts = torch.empty(rows, longest + 1, 3, dtype=torch.int64)
    packed_sizes = torch.empty(rows, dtype=torch.int64)
    if in_halves:
        _fill_layouts(n, m, lines.numpy(), layouts.numpy(), packed_sizes.numpy())
    job = _Job(
        *(cost, threads),
        gamma=gamma,
        keep=keep,
        blocks=first.shape[1],
        rows=rows,
        room=room,
        longest=longest,
        side=side,
        alignments=alignment,
        values=value,
        columns=first,
        x_lengths=x_lengths,
        y_lengths=y_lengths,
        lines=lines,
        order=torch.from_numpy(np.argsort(-sizes, kind="stable")),
        layouts=layouts,
        cells=packed_sizes,
        packed=empty((rows, room), cost),
        left=empty((rows, room * keep), cost),
        largest=cost.new_empty(B, 2),
        mantissas=cost.new_empty(B, 2, side),
        exponents=torch.empty(B, 2, side, dtype=_WHOLE_NUMBER[cost.dtype]),
        borders=cost.new_empty(B, 4, side * keep),
    )
    if not in_halves:
        job.run(_WHOLE, B)
        return
    for phase in (_PACK, _ACCUMULATE, _MEET, *((_OUTWARDS, _UNPACK) if keep else ())):
        job.run(phase, B if phase == _MEET else 2 * B)


def scale(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply x (B, N, W) by factors (B,) in place, unseen by autograd, which may have saved x."""
    threads = torch.get_num_threads() if x.numel() >= _CELLS_OF_THREADS else 1
    job = _Job(x, threads, alignments=x, values=factors.contiguous())
    job.run(_SCALE, len(x) * -(-x.shape[1] // ROWS))
    return x
