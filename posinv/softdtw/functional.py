"""Soft-DTW of cost matrices (Cuturi & Blondel, ICML 2017): checks, back ends, gradient."""

import importlib
import math
import operator
from typing import Any

import torch
from torch import Tensor

from posinv.errors import InputError
from posinv.lengths import Lengths, checked_lengths, is_known, on_device
from posinv.softdtw import torch_diagonal
from posinv.softdtw.band import Band, check_kind, make_band
from posinv.softdtw.memory import has_room
from posinv.softdtw.transforms import BatchFunction, in_transform

# Each module has align(cost, band, gamma, with_alignment), which returns the values (B,) and, if
# asked for, the alignments, stored as the costs are: (B, N, W) (see posinv.softdtw.band). Costs are
# float32 or float64. The band is on the CPU and checked; "cuda" also takes one on the GPU that is
# not. The modules are imported on first use, as numba takes time to import.
_BACKENDS = {
    "cpu": "posinv.softdtw.cpu",
    "cuda": "posinv.softdtw.cuda",
    "torch": "posinv.softdtw.torch_diagonal",
    "reference": "posinv.softdtw.reference",
}
BACKENDS = ("auto", *_BACKENDS)


def soft_dtw(
    cost: Tensor,
    x_lengths: Lengths | int | None = None,
    y_lengths: Lengths | int | None = None,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    backend: str = "auto",
    band: str = "slanted",
) -> Tensor:
    r"""Soft-DTW value of a batch of cost matrices, differentiable in the cost.

    .. math:: r_{ij} = c_{ij} - \gamma \log (e^{-r_{i-1,j-1}/\gamma} + e^{-r_{i-1,j}/\gamma}
        + e^{-r_{i,j-1}/\gamma}), \quad r_{00} = 0

    and the value is :math:`r_{nm}`: the soft minimum, over all monotonic paths from the first to
    the last cell, of the summed cost (Cuturi & Blondel, *Soft-DTW: a Differentiable Loss Function
    for Time-Series*, ICML 2017, algorithms 1 and 2). It may be negative. Its gradient is the
    expected alignment.

    The gradient can be differentiated once more (create_graph=True; Mensch & Blondel,
    *Differentiable Dynamic Programming for Structured Prediction and Attention*, ICML 2018). This
    takes the time of the back end "torch". torch.func's vmap, grad, vjp and jacrev work, and so
    does torch.compile, which treats a back end as one operator; forward-mode derivatives (jvp,
    jacfwd) are not there.

    With a band, only the cells inside it are computed and stored, with B (N + 63) W of them at
    most, W the largest number of columns that a pair has in 65 rows. The cost that is given, and
    its gradient, are whole; :class:`~posinv.softdtw.SoftDTWLoss` computes only the band from
    features, too.

    Args:
        cost: (B, N, M), or (N, M) for one pair; floating point. float64 is computed and returned as
            float64, float32 as float32, float16 and bfloat16 in float32 and returned as float32;
            the gradient has the cost's own type. Cells outside the lengths and the band are never
            read, and their gradient is zero. An utterance with a NaN or infinite cost inside its
            lengths and band has the value NaN and a gradient of NaN there; the others are
            unaffected.
        x_lengths: (B,) integers in 1..N, valid rows; None for all N. The back end "cuda" does not
            wait for lengths on a GPU: where they are out of range or differ by more than a fixed
            band, it raises no InputError, but value and gradient are NaN. A slanted band's cost is
            stored whole then, as its width depends on the lengths; so it is in torch.compile.
        y_lengths: (B,) integers in 1..M, valid columns; None for all M.
        gamma: smoothing, >= 0, in the unit of the cost. 0 is DTW itself (the hard minimum); its
            gradient marks one optimal path. Of equally good predecessors it takes (i-1, j-1), then
            (i-1, j), then (i, j-1).
        bandwidth: half the width of the band in frames, >= 0; None is no band. 0 is the narrowest
            band, the diagonal. (In Maghoumi's pytorch-softdtw-cuda and in pysdtw, 0 is no band;
            their other values are fixed bands.)
        backend: "cpu" (compiled; CPU tensors only), "cuda" (NVIDIA GPUs), "torch" (any device, one
            step a diagonal: slow), "reference" (float64 Python loops, for tests), or "auto": "cpu"
            for CPU tensors, "cuda" for CUDA tensors, else "torch".
        band: which cells (i, j) of n by m frames can be on a path. "slanted": those near the line
            from the first to the last cell, :math:`2 |i (m-1) - j (n-1)| \le (2\,\mathrm{bandwidth}
            + 1) \max(n-1, m-1)`. For each frame of the longer sequence these are the frames of the
            shorter one at most bandwidth + 1/2 from the line, so that there is always a path, for
            any two lengths. "fixed": those with :math:`|i - j| \le \mathrm{bandwidth}` (Sakoe &
            Chiba), which must be at least the difference of the lengths. For n = m they are the
            same.

    Returns:
        (B,) values; () for one pair.

    Raises:
        InputError: a shape, type, length, gamma, bandwidth, band or backend that does not fit.
    """
    if cost.dim() == 2:
        lengths = one_length(x_lengths), one_length(y_lengths)
        return soft_dtw(cost[None], *lengths, gamma, bandwidth, backend, band)[0]
    return align(*_checked("soft_dtw", cost, x_lengths, y_lengths, gamma, bandwidth, backend, band))


def soft_alignment(
    cost: Tensor,
    x_lengths: Lengths | int | None = None,
    y_lengths: Lengths | int | None = None,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    backend: str = "auto",
    band: str = "slanted",
) -> Tensor:
    """Expected alignment: the gradient of :func:`soft_dtw` in the cost, differentiable once.

    Args:
        cost: as for :func:`soft_dtw`, like every other argument.
        x_lengths: (B,) integers in 1..N, valid rows; None for all N.
        y_lengths: (B,) integers in 1..M, valid columns; None for all M.
        gamma: smoothing, >= 0; 0 marks one optimal path.
        bandwidth: half the width of the band in frames; None is no band.
        backend: "auto", "cpu", "cuda", "torch" or "reference".
        band: "slanted" or "fixed".

    Returns:
        (B, N, M), or (N, M), in [0, 1] up to rounding: the probability that a path, drawn with
        probability proportional to exp(-its cost / gamma), visits a cell. Zero outside the lengths
        and band.

    Raises:
        InputError: as :func:`soft_dtw`.
    """
    if cost.dim() == 2:
        lengths = one_length(x_lengths), one_length(y_lengths)
        return soft_alignment(cost[None], *lengths, gamma, bandwidth, backend, band)[0]
    stored, cells, gamma, backend = _checked(
        "soft_alignment", cost, x_lengths, y_lengths, gamma, bandwidth, backend, band
    )
    tensors = cells.tensors()
    found = _SoftDTW.apply(stored.detach(), *tensors, cells.M, gamma, backend, True)[1]
    if stored.requires_grad or in_transform(stored):
        found = _Alignment.apply(stored, found, *tensors, cells.M, gamma)
    if cells.width == cells.M:
        return found
    whole = found.new_zeros(cost.shape)
    return whole.scatter(2, cells.columns(cost.device), found)


def one_length(length: Lengths | int | None) -> Tensor | None:
    """Return the length of one sequence as that of a batch of one."""
    return None if length is None else torch.as_tensor(length).reshape(1)


def align(cost: Tensor, band: Band, gamma: float, backend: str) -> Tensor:
    """Return the values (B,) of stored costs (B, N, W), differentiable twice in them.

    Args:
        cost: float32 or float64; only the cells inside the band are read.
        band: which cells these are.
        gamma: smoothing, checked.
        backend: one of BACKENDS but "auto", checked.

    Raises:
        InputError: lengths with no path within the band.
    """
    keep = cost.requires_grad and torch.is_grad_enabled() and has_room(cost)
    return _SoftDTW.apply(cost, *band.tensors(), band.M, gamma, backend, keep)[0]


def _run(
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    lines: Tensor,
    first: Tensor,
    M: int,
    gamma: float,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Run a back end: values, and alignments or, unless keep, an empty tensor (B, 0, 0)."""
    band = Band(x_lengths, y_lengths, lines, first, *(cost.shape[1], M, cost.shape[2]))
    if backend != "cuda":
        _check_paths(band)
    module = importlib.import_module(_BACKENDS[backend])
    value, alignment = module.align(cost.detach(), band, gamma, keep)
    return value, cost.new_empty(len(cost), 0, 0) if alignment is None else alignment


# In torch.compile, a back end is an operator that is not looked into.
_operator = torch.library.custom_op("posinv::soft_dtw", _run, mutates_args=())


@_operator.register_fake
def _shapes(cost: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    keep = args[-1]
    return cost.new_empty(len(cost)), cost.new_empty(cost.shape if keep else (len(cost), 0, 0))


def _check_paths(band: Band) -> None:
    """Raise InputError where the last cell of a pair is outside its band, or a length is 0."""
    p, q, reach = band.lines.numpy().T
    n, m = band.x_lengths.numpy(), band.y_lengths.numpy()
    outside = 2 * abs((n - 1) * q - (m - 1) * p) > reach
    for b in (outside | (n < 1) | (m < 1)).nonzero()[0][:1]:
        if n[b] < 1 or m[b] < 1:
            raise InputError(
                f"soft_dtw: the lengths of batch index {b} must be in 1..{band.N} and 1..{band.M}"
            )
        raise InputError(
            f"soft_dtw: no path within bandwidth {reach[b] // 2} for batch index {b}: its lengths"
            f" are {n[b]} and {m[b]}; use a bandwidth of at least {abs(n - m).max()} for this"
            ' batch, or band "slanted"'
        )


class _SoftDTW(BatchFunction):
    """The alignment is computed with the value or, if memory is short, in the backward."""

    @staticmethod
    def forward(  # not *args: torch.compile counts parameters
        cost: Tensor,
        x_lengths: Tensor,
        y_lengths: Tensor,
        lines: Tensor,
        first: Tensor,
        M: int,
        gamma: float,
        backend: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        run = _operator if torch.compiler.is_compiling() else _run
        return run(cost, x_lengths, y_lengths, lines, first, M, gamma, backend, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        cost, *band, M, gamma, backend, keep = inputs
        alignment = output[1]
        ctx.options, ctx.kept = (M, gamma, backend), keep
        ctx.mark_non_differentiable(alignment)
        ctx.save_for_backward(cost, alignment, *band)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # else the alignment gets a gradient of zeros

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        cost, alignment, *band = ctx.saved_tensors
        M, gamma, _ = ctx.options
        if not ctx.kept:
            alignment = _SoftDTW.apply(cost.detach(), *band, *ctx.options, True)[1]
        if torch.is_grad_enabled():
            alignment = _Alignment.apply(cost, alignment, *band, M, gamma)
            gradient = alignment * grad[:, None, None]
        elif in_transform(grad):
            gradient = alignment * grad[:, None, None]
        else:
            # The alignment becomes the gradient. A second backward (retain_graph) computes it anew.
            ctx.kept = False
            gradient = _scale(alignment, grad, ctx.options[2])
        return gradient, *[None] * 8


class _Alignment(BatchFunction):
    """The alignment, already known, as a function of the cost: it has a derivative."""

    @staticmethod
    def forward(cost: Tensor, alignment: Tensor, *args: Any) -> Tensor:
        return alignment.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        cost, _, *band, M, gamma = inputs
        ctx.options = M, gamma
        ctx.save_for_backward(cost, *band)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cost, *band = ctx.saved_tensors
        # The Hessian is symmetric: grad times it is it times grad.
        return _AlignmentChange.apply(cost, grad, *band, *ctx.options), *[None] * 7


class _AlignmentChange(BatchFunction):
    """The alignment's derivative in a direction, which is the second input."""

    @staticmethod
    def forward(cost: Tensor, change: Tensor, *args: Any) -> Tensor:
        x_lengths, y_lengths, lines, first, M, gamma = args
        shape = cost.shape[1], M, cost.shape[2]
        of = Band(x_lengths, y_lengths, lines, first, *shape)
        return torch_diagonal.alignment_change(cost.detach(), of, gamma, change.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "soft_dtw has no third derivative: differentiate its gradient without create_graph=True"
        )


def _scale(x: Tensor, factors: Tensor, backend: str) -> Tensor:
    """Multiply x (B, N, W) by factors (B,) in place, unseen by autograd, which may have saved x."""
    if backend == "cpu":
        from posinv.softdtw import cpu

        return cpu.scale(x, factors)
    return x.data.mul_(factors[:, None, None])


def _checked(
    name: str,
    cost: Tensor,
    x_lengths: Lengths | int | None,
    y_lengths: Lengths | int | None,
    gamma: float,
    bandwidth: int | None,
    backend: str,
    band: str,
) -> tuple[Tensor, Band, float, str]:
    """Return the stored costs, their band, gamma and the back end, checked."""
    if cost.dim() != 3:
        raise InputError(f"{name}: cost must be (B, N, M), got shape {tuple(cost.shape)}")
    if not cost.is_floating_point():
        raise InputError(f"{name}: cost must be floating point, got {cost.dtype}")
    B, N, M = cost.shape
    backend = checked_backend(name, backend, cost.device)
    x_lengths = checked_lengths(f"{name}: x_lengths", x_lengths, B, N, cost)
    y_lengths = checked_lengths(f"{name}: y_lengths", y_lengths, B, M, cost)
    gamma, bandwidth = check_gamma(name, gamma), check_bandwidth(name, bandwidth)
    check_kind(name, band)
    cells = band_of(x_lengths, y_lengths, N, M, bandwidth, band, backend)
    if cells.width < M:
        cost = cost.gather(2, cells.columns(cost.device))
    if cost.dtype not in (torch.float32, torch.float64):
        cost = cost.float()
    return cost, cells, gamma, backend


def band_of(
    x_lengths: Tensor,
    y_lengths: Tensor,
    N: int,
    M: int,
    bandwidth: int | None,
    kind: str,
    backend: str,
) -> Band:
    """Return the band of checked lengths and options, where the back end wants its tensors."""
    if backend != "cuda":
        x_lengths, y_lengths = x_lengths.cpu(), y_lengths.cpu()
    elif x_lengths.device != y_lengths.device:
        device = x_lengths.device if x_lengths.is_cuda else y_lengths.device
        x_lengths, y_lengths = on_device(x_lengths, N, device), on_device(y_lengths, M, device)
    if y_lengths is x_lengths:
        y_lengths = x_lengths.clone()  # torch.compile takes no tensor twice
    known = is_known(x_lengths) and is_known(y_lengths)
    return make_band(x_lengths, y_lengths, N, M, bandwidth, kind, known)


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


def checked_backend(name: str, backend: str, device: torch.device) -> str:
    """Return the back end that computes costs on a device."""
    check_backend(name, backend)
    if backend == "auto":
        return device.type if device.type in _BACKENDS else "torch"
    if backend in ("cpu", "cuda") and device.type != backend:
        raise InputError(
            f'{name}: backend "{backend}" got a cost on {device}; use "auto" or "torch"'
        )
    return backend
