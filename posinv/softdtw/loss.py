"""Losses on feature sequences: soft-DTW (divergence) and LASER's temporal regulariser."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from posinv.errors import InputError
from posinv.lengths import on_device, valid_mask
from posinv.softdtw.functional import (
    check_backend,
    check_bandwidth,
    check_gamma,
    checked_lengths,
    soft_dtw,
)

COSTS = ("sqeuclidean", "cosine")


class SoftDTWLoss(nn.Module):
    r"""Soft-DTW between two feature sequences, or the soft-DTW divergence.

    .. math:: D_\gamma(x, y) = s_\gamma(x, y) - \tfrac12 (s_\gamma(x, x) + s_\gamma(y, y))

    with :math:`s_\gamma` :func:`~posinv.softdtw.soft_dtw` of the frames' distances. Soft-DTW
    itself is not smallest at x = y and may be negative; the divergence is 0 there (Blondel, Mensch
    & Vert, *Differentiable Divergences Between Time Series*, AISTATS 2021; Meghanani & Hain,
    *LASER*, Interspeech 2024, section 2).

    Args:
        gamma: smoothing, >= 0, in the unit of the cost.
        divergence: subtract half the two self-alignments.
        cost: "sqeuclidean", the squared Euclidean distance of two frames, or "cosine", one minus
            their cosine similarity, computed as half the squared distance of the L2-normalised
            frames. (A frame of zeros stays zero: at 1/2 from every other, without gradient.)
        bandwidth: Sakoe-Chiba band in frames, see :func:`~posinv.softdtw.soft_dtw`; None for none.
        backend: see :func:`~posinv.softdtw.soft_dtw`.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        gamma: float = 0.1,
        divergence: bool = True,
        cost: str = "sqeuclidean",
        bandwidth: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_gamma("SoftDTWLoss", gamma)
        check_bandwidth("SoftDTWLoss", bandwidth)
        check_backend("SoftDTWLoss", backend)
        if cost not in COSTS:
            raise InputError(f"SoftDTWLoss: cost must be one of {', '.join(COSTS)}, got {cost!r}")
        self.gamma = gamma
        self.divergence = divergence
        self.cost = cost
        self.bandwidth = bandwidth
        self.backend = backend

    def extra_repr(self) -> str:
        """Return the arguments, for print."""
        return (
            f"gamma={self.gamma}, divergence={self.divergence}, cost={self.cost!r},"
            f" bandwidth={self.bandwidth}, backend={self.backend!r}"
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each pair, summed along the path, not divided by any length.

        Args:
            x: (B, N, D) features, floating point; half precision is computed in float32. Frames
                beyond the lengths are never read.
            y: (B, M, D) features.
            x_lengths: (B,) integers in 1..N; None for all N.
            y_lengths: (B,) integers in 1..M; None for all M.

        Returns:
            (B,), float32, or float64 if either input is.

        Raises:
            InputError: shapes or lengths that do not fit.
        """
        if x.dim() != 3 or y.dim() != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
            raise InputError(
                "SoftDTWLoss: x must be (B, N, D) and y (B, M, D), got shapes"
                f" {tuple(x.shape)} and {tuple(y.shape)}"
            )
        x, x_lengths = _valid("SoftDTWLoss", "x", x, "x_lengths", x_lengths)
        y, y_lengths = _valid("SoftDTWLoss", "y", y, "y_lengths", y_lengths)
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        if self.cost == "cosine":
            x, y = _normalised(x) / math.sqrt(2), _normalised(y) / math.sqrt(2)
        centre = (_mean(x, x_lengths) + _mean(y, y_lengths)) / 2
        x, y = x - centre, y - centre

        loss = self._soft_dtw(_SquaredDistance.apply(x, y), x_lengths, y_lengths)
        if self.divergence:
            loss = loss - 0.5 * (
                self._soft_dtw(_SquaredSelfDistance.apply(x), x_lengths, x_lengths)
                + self._soft_dtw(_SquaredSelfDistance.apply(y), y_lengths, y_lengths)
            )
        return loss

    def _soft_dtw(self, cost: Tensor, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
        return soft_dtw(cost, x_lengths, y_lengths, self.gamma, self.bandwidth, self.backend)


class ContrastiveIDM(nn.Module):
    r"""Contrastive inverse difference moment: keeps frames apart that are apart in time.

    .. math:: \frac1{n^2} \sum_{ij} [|i-j| > w]\, w_{ij} \max(0, \lambda - d_{ij})
        + [|i-j| \le w]\, d_{ij} / w_{ij}, \quad w_{ij} = (i-j)^2 + 1

    with :math:`d_{ij}` the Euclidean distance of frames i and j (Haresh et al., *Learning by
    Aligning Videos in Time*, CVPR 2021, equation 7; the regulariser of LASER). At distance zero
    the gradient is taken as zero.

    Args:
        margin: the distance, >= 0, beyond which frames far apart in time cost nothing.
        window: frames, >= 0: up to this lag frames are pulled together, beyond it pushed apart.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(self, margin: float, window: int) -> None:
        super().__init__()
        if not (math.isfinite(margin) and margin >= 0):
            raise InputError(f"ContrastiveIDM: margin must be finite and >= 0, got {margin}")
        if not isinstance(window, int) or window < 0:
            raise InputError(f"ContrastiveIDM: window must be an integer >= 0, got {window}")
        self.margin = margin
        self.window = window

    def extra_repr(self) -> str:
        """Return the arguments, for print."""
        return f"margin={self.margin}, window={self.window}"

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the regulariser of each utterance.

        Args:
            x: (B, N, D) features, floating point; half precision is computed in float32. Frames
                beyond the lengths are never read.
            lengths: (B,) integers in 1..N; None for all N.

        Returns:
            (B,), float32, or float64 if x is.

        Raises:
            InputError: shapes or lengths that do not fit.
        """
        if x.dim() != 3:
            raise InputError(f"ContrastiveIDM: x must be (B, N, D), got shape {tuple(x.shape)}")
        x, lengths = _valid("ContrastiveIDM", "x", x, "lengths", lengths)
        squared = _SquaredSelfDistance.apply(x - _mean(x, lengths))
        apart = squared > 0
        distance = torch.where(apart, squared, 1.0).sqrt() * apart
        frame = torch.arange(x.shape[1], device=x.device)
        lag = frame[:, None] - frame  # N, N
        weight = (lag.square() + 1).to(x.dtype)
        term = torch.where(
            lag.abs() > self.window,
            weight * (self.margin - distance).clamp(min=0),
            distance / weight,
        )
        lengths = on_device(lengths, x.shape[1], x.device)
        valid = frame < lengths[:, None]  # B, N
        total = (term * (valid[:, :, None] & valid[:, None, :])).sum(dim=(1, 2))
        return total / lengths.square()


def _valid(
    name: str, x_name: str, x: Tensor, lengths_name: str, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features in float32 or float64 with zeros beyond the lengths, and the checked lengths."""
    if not x.is_floating_point():
        raise InputError(f"{name}: {x_name} must be floating point, got {x.dtype}")
    lengths = checked_lengths(f"{name}: {lengths_name}", lengths, x.shape[0], x.shape[1], x)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    valid = valid_mask(lengths, x.shape[1], x.device)
    return x.masked_fill(~valid[:, :, None], 0.0), lengths


def _mean(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean frame of each utterance, (B, 1, D).

    No distance depends on where the features are centred, hence no gradient; but near the origin
    the expansion of the squared distance loses fewer digits.
    """
    lengths = on_device(lengths, x.shape[1], x.device)
    return x.detach().sum(dim=1, keepdim=True) / lengths[:, None, None]


def _normalised(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Without autocast, and without TF32 or bfloat16 within float32: either loses near frames."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, M) squared distances by the expansion, one batched product and two sums in place."""
    with _full_float32(x.device):
        y_square = y.square().sum(dim=2)[:, None, :]
        return (
            torch.baddbmm(y_square, x, y.mT, alpha=-2)
            .add_(x.square().sum(dim=2, keepdim=True))
            .clamp_(min=0)
        )


class _SquaredDistance(torch.autograd.Function):
    """Saves the features alone; the clamp at 0, which is of rounding, is not differentiated."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return _squared_distance(x, y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        with _full_float32(x.device):
            grad_x = grad.sum(dim=2, keepdim=True) * x - grad @ y
            grad_y = grad.sum(dim=1)[:, :, None] * y - grad.mT @ x
        return 2 * grad_x, 2 * grad_y


class _SquaredSelfDistance(torch.autograd.Function):
    """Squared distances of a sequence's own frames, with zeros on the diagonal."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        distance = _squared_distance(x, x)
        distance.diagonal(dim1=1, dim2=2).zero_()
        return distance

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with _full_float32(x.device):
            both = grad + grad.mT
            return 2 * (both.sum(dim=2, keepdim=True) * x - both @ x)
