"""Soft-DTW of cost matrices (Cuturi & Blondel, ICML 2017): checks, back ends, gradient."""

import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posinv.errors import InputError
from posinv.lengths import Lengths, checked_lengths
from posinv.softdtw.memory import has_room

# Each module has align(cost, x_lengths, y_lengths, gamma, bandwidth, with_alignment), which returns
# the values (B,) and, if asked for, the alignments (B, N, M). Costs are float32 or float64. Lengths
# are int64 on the CPU and checked; "cuda" also takes unchecked lengths on the GPU. The modules are
# imported on first use, as numba takes time to import.
_BACKENDS = {
    "cpu": "posinv.softdtw.cpu",
    "cuda": "posinv.softdtw.cuda",
    "torch": "posinv.softdtw.torch_diagonal",
    "reference": "posinv.softdtw.reference",
}
BACKENDS = ("auto", *_BACKENDS)


def soft_dtw(
    cost: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Soft-DTW value of a batch of cost matrices, differentiable in the cost.

    .. math:: r_{ij} = c_{ij} - \gamma \log (e^{-r_{i-1,j-1}/\gamma} + e^{-r_{i-1,j}/\gamma}
        + e^{-r_{i,j-1}/\gamma}), \quad r_{00} = 0

    and the value is :math:`r_{nm}`: the soft minimum, over all monotonic paths from the first to
    the last cell, of the summed cost (Cuturi & Blondel, *Soft-DTW: a Differentiable Loss Function
    for Time-Series*, ICML 2017, algorithms 1 and 2). It may be negative. Its gradient, the
    expected alignment, cannot be differentiated again: create_graph=True raises RuntimeError.

    Args:
        cost: (B, N, M), floating point. float64 is computed and returned as float64, float32 as
            float32, float16 and bfloat16 in float32 and returned as float32; the gradient has the
            cost's own type. Cells outside the lengths are never read, and their gradient is zero.
            An utterance with a NaN or infinite cost inside its lengths and band has the value NaN
            and a gradient of NaN there; the others are unaffected.
        x_lengths: (B,) integers in 1..N, valid rows; None for all N. The back end "cuda" does not
            wait for lengths on a GPU: where they are out of range or differ by more than the
            bandwidth, it raises no InputError, but value and gradient are NaN.
        y_lengths: (B,) integers in 1..M, valid columns; None for all M.
        gamma: smoothing, >= 0, in the unit of the cost. 0 is DTW itself (the hard minimum); its
            gradient marks one optimal path. Of equally good predecessors it takes (i-1, j-1), then
            (i-1, j), then (i, j-1).
        bandwidth: Sakoe-Chiba band: only cells with abs(i - j) <= bandwidth frames are on a path,
            whatever the two lengths are, so it must be at least their difference. 0 leaves the
            diagonal alone; None is no band.
        backend: "cpu" (compiled; CPU tensors only), "cuda" (NVIDIA GPUs), "torch" (any device, one
            step a diagonal: slow), "reference" (float64 Python loops, for tests), or "auto": "cpu"
            for CPU tensors, "cuda" for CUDA tensors, else "torch".

    Returns:
        (B,) values.

    Raises:
        InputError: a shape, type, length, gamma, bandwidth or backend that does not fit.
    """
    return _SoftDTW.apply(
        *_checked("soft_dtw", cost, x_lengths, y_lengths, gamma, bandwidth, backend)
    )


def soft_alignment(
    cost: Tensor,
    x_lengths: Lengths | None = None,
    y_lengths: Lengths | None = None,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Expected alignment: the gradient of :func:`soft_dtw` in the cost, itself not differentiable.

    Args:
        cost: as for :func:`soft_dtw`, like every other argument.
        x_lengths: (B,) integers in 1..N, valid rows; None for all N.
        y_lengths: (B,) integers in 1..M, valid columns; None for all M.
        gamma: smoothing, >= 0; 0 marks one optimal path.
        bandwidth: Sakoe-Chiba band; None is no band.
        backend: "auto", "cpu", "cuda", "torch" or "reference".

    Returns:
        (B, N, M), in [0, 1] up to rounding: the probability that a path, drawn with probability
        proportional to exp(-its cost / gamma), visits a cell. Zero outside the lengths and band.

    Raises:
        InputError: as :func:`soft_dtw`.
    """
    checked = _checked("soft_alignment", cost, x_lengths, y_lengths, gamma, bandwidth, backend)
    align, cost, *rest = checked
    return align(cost.detach(), *rest, True)[1]


class _SoftDTW(torch.autograd.Function):
    """The alignment is computed with the value or, if memory is short, in the backward."""

    @staticmethod
    def forward(ctx: Any, align: Callable, cost: Tensor, *args: Any) -> Tensor:
        wanted = ctx.needs_input_grad[1]
        now = wanted and has_room(cost)
        value, alignment = align(cost.detach(), *args, now)
        ctx.align, ctx.args, ctx.alignment = align, args, alignment
        if wanted:
            ctx.save_for_backward(cost)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable does not raise where grad is a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "soft_dtw has no second derivative: differentiate it without create_graph=True"
            )
        # The alignment becomes the gradient. A second backward (retain_graph) computes it again.
        alignment, ctx.alignment = ctx.alignment, None
        if alignment is None:
            alignment = ctx.align(*ctx.saved_tensors, *ctx.args, True)[1]
        return None, _scale(alignment, grad[:, None, None]), None, None, None, None


def _scale(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x by the factor in place."""
    if x.device.type != "cpu":
        return x.mul_(factor)
    # Not by torch: its threads would then spin for milliseconds on cores that the next alignment
    # needs.
    np.multiply(x.numpy(), factor.numpy(), out=x.numpy())
    return x


def _checked(
    name: str,
    cost: Tensor,
    x_lengths: Lengths | None,
    y_lengths: Lengths | None,
    gamma: float,
    bandwidth: int | None,
    backend: str,
) -> tuple[Callable, Tensor, Tensor, Tensor, float, int | None]:
    """Return the back end's align and its arguments, checked."""
    if cost.dim() != 3:
        raise InputError(f"{name}: cost must be (B, N, M), got shape {tuple(cost.shape)}")
    if not cost.is_floating_point():
        raise InputError(f"{name}: cost must be floating point, got {cost.dtype}")
    if cost.dtype not in (torch.float32, torch.float64):
        cost = cost.float()
    B, N, M = cost.shape
    check_backend(name, backend)
    if backend == "auto":
        backend = cost.device.type if cost.device.type in _BACKENDS else "torch"
    elif backend in ("cpu", "cuda") and cost.device.type != backend:
        raise InputError(
            f'{name}: backend "{backend}" got a cost on {cost.device}; use "auto" or "torch"'
        )
    if backend != "cuda":
        x_lengths, y_lengths = (
            lengths.cpu() if isinstance(lengths, Tensor) else lengths
            for lengths in (x_lengths, y_lengths)
        )
    x_lengths = checked_lengths(f"{name}: x_lengths", x_lengths, B, N, cost)
    y_lengths = checked_lengths(f"{name}: y_lengths", y_lengths, B, M, cost)
    gamma, bandwidth = check_gamma(name, gamma), check_bandwidth(name, bandwidth)
    if bandwidth is not None:
        bandwidth = min(bandwidth, max(N, M))
    if bandwidth is not None and x_lengths.device == y_lengths.device == torch.device("cpu"):
        lag = (x_lengths - y_lengths).abs()
        for b in (lag > bandwidth).nonzero().flatten().tolist()[:1]:
            raise InputError(
                f"{name}: no path within bandwidth {bandwidth} for batch index {b}: its lengths are"
                f" {x_lengths[b]} and {y_lengths[b]}; use a bandwidth of at least {lag.max()} for"
                " this batch, or None"
            )
    align = importlib.import_module(_BACKENDS[backend]).align
    return align, cost, x_lengths, y_lengths, gamma, bandwidth


def check_gamma(name: str, gamma: float) -> float:
    """Return gamma as a float; raise InputError unless it is finite and >= 0, and a constant."""
    if isinstance(gamma, Tensor) and gamma.requires_grad:
        raise InputError(
            f"{name}: gamma cannot be learned, soft-DTW has no gradient in it: give a number"
        )
    try:
        number = float(gamma)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InputError(f"{name}: gamma must be finite and >= 0 (0 is hard DTW), got {gamma}")
    return number


def check_bandwidth(name: str, bandwidth: int | None) -> int | None:
    """Return bandwidth as an int or None; raise InputError unless it is None or an integer >= 0."""
    if bandwidth is None:
        return None
    try:
        number = operator.index(bandwidth)
    except TypeError:
        number = -1
    if number < 0 or isinstance(bandwidth, bool):
        raise InputError(
            f"{name}: bandwidth must be None (no band) or an integer >= 0, got {bandwidth}"
        )
    return number


def check_backend(name: str, backend: str) -> None:
    """Raise InputError unless backend is known."""
    if backend not in BACKENDS:
        raise InputError(f"{name}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
