"""Soft-DTW between two feature sequences, and the soft-DTW divergence."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posinv.errors import InputError
from posinv.lengths import Lengths, on_device
from posinv.softdtw.band import check_kind
from posinv.softdtw.distance import (
    Features,
    SquaredDistance,
    SquaredSelfDistance,
    as_batch,
    band_distance,
    mean_frame,
    unit_frames,
    valid_features,
)
from posinv.softdtw.functional import (
    align,
    band_of,
    check_backend,
    check_bandwidth,
    check_gamma,
    checked_backend,
    soft_dtw,
)

COSTS = ("sqeuclidean", "cosine")
Cost = str | Callable[[Tensor, Tensor], Tensor]


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
        cost: "sqeuclidean", the squared Euclidean distance of two frames; "cosine", one minus
            their cosine similarity, computed as half the squared distance of the L2-normalised
            frames (a frame of zeros has the cost 1/2 to every other one and gets no gradient); or
            a function of x (B, N, D) and y (B, M, D) that returns their costs (B, N, M). It gets
            features that are zero beyond the lengths.
        bandwidth: half the width of a band in frames, see :func:`~posinv.softdtw.soft_dtw`; None
            for no band. The self-alignments have it, too. Unless the cost is a function, only the
            costs inside it are computed and stored.
        backend: see :func:`~posinv.softdtw.soft_dtw`.
        normalize_features: scale each frame to unit L2 norm first, as LASER does.
        normalize_length: divide by the sum of the two frame counts, so that the loss is per frame.
        band: "slanted" or "fixed", see :func:`~posinv.softdtw.soft_dtw`.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        gamma: float = 0.1,
        divergence: bool = True,
        cost: Cost = "sqeuclidean",
        bandwidth: int | None = None,
        backend: str = "auto",
        normalize_features: bool = False,
        normalize_length: bool = False,
        band: str = "slanted",
    ) -> None:
        super().__init__()
        self.gamma = check_gamma("SoftDTWLoss", gamma)
        self.bandwidth = check_bandwidth("SoftDTWLoss", bandwidth)
        check_backend("SoftDTWLoss", backend)
        check_kind("SoftDTWLoss", band)
        if not callable(cost) and cost not in COSTS:
            raise InputError(
                f"SoftDTWLoss: cost must be one of {', '.join(COSTS)}, or a function of x and y, "
                f"got {cost!r}"
            )
        self.divergence = divergence
        self.cost = cost
        self.backend = backend
        self.normalize_features = normalize_features
        self.normalize_length = normalize_length
        self.band = band

    def extra_repr(self) -> str:
        """Return the arguments, for print."""
        return (
            f"gamma={self.gamma}, divergence={self.divergence}, cost={self.cost!r},"
            f" bandwidth={self.bandwidth}, band={self.band!r}, backend={self.backend!r},"
            f" normalize_features={self.normalize_features},"
            f" normalize_length={self.normalize_length}"
        )

    def forward(
        self,
        x: Features,
        y: Features,
        x_lengths: Lengths | int | None = None,
        y_lengths: Lengths | int | None = None,
    ) -> Tensor:
        """Return the loss of each pair: a sum along the path, unless ``normalize_length``.

        Args:
            x: (B, N, D) features, floating point; half precision is computed in float32. Frames
                beyond the lengths are never read. Also (N, D), one sequence, or a PackedSequence.
            y: (B, M, D) features, (M, D) beside one sequence x, or a PackedSequence.
            x_lengths: (B,) integers in 1..N; None for all N, and for a PackedSequence.
            y_lengths: (B,) integers in 1..M; None for all M.

        Returns:
            (B,), float32, or float64 if either input is; () for (N, D) and (M, D).

        Raises:
            InputError: shapes or lengths that do not fit.
        """
        x, x_lengths, one_x = as_batch("SoftDTWLoss", "x", x, "x_lengths", x_lengths)
        y, y_lengths, one_y = as_batch("SoftDTWLoss", "y", y, "y_lengths", y_lengths)
        if x.dim() != 3 or y.dim() != 3 or x.shape[::2] != y.shape[::2] or one_x != one_y:
            raise InputError(
                "SoftDTWLoss: x must be (B, N, D) and y (B, M, D), got shapes"
                f" {tuple(x.shape[one_x:])} and {tuple(y.shape[one_y:])}"
            )
        x, x_lengths = valid_features("SoftDTWLoss", "x", x, "x_lengths", x_lengths)
        y, y_lengths = valid_features("SoftDTWLoss", "y", y, "y_lengths", y_lengths)
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
        if self.normalize_features:
            x, y = F.normalize(x, dim=2), F.normalize(y, dim=2)
        if self.cost == "cosine":
            x, y = unit_frames(x) / math.sqrt(2), unit_frames(y) / math.sqrt(2)
        if not callable(self.cost):
            centre = (mean_frame(x, x_lengths) + mean_frame(y, y_lengths)) / 2
            x, y = x - centre, y - centre

        loss = self._soft_dtw(x, y, x_lengths, y_lengths)
        if self.divergence:
            loss = loss - 0.5 * (
                self._soft_dtw(x, x, x_lengths, x_lengths)
                + self._soft_dtw(y, y, y_lengths, y_lengths)
            )
        if self.normalize_length:
            frames = on_device(x_lengths + y_lengths, x.shape[1] + y.shape[1], loss.device)
            loss = loss / frames
        return loss[0] if one_x else loss

    def _soft_dtw(self, x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
        if callable(self.cost):
            options = self.gamma, self.bandwidth, self.backend, self.band
            return soft_dtw(_called(self.cost, x, y), x_lengths, y_lengths, *options)
        backend = checked_backend("SoftDTWLoss", self.backend, x.device)
        N, M = x.shape[1], y.shape[1]
        band = band_of(x_lengths, y_lengths, N, M, self.bandwidth, self.band, backend)
        if band.width < M:
            cost = band_distance(x, y, band)
        elif x is y:
            cost = SquaredSelfDistance.apply(x)
        else:
            cost = SquaredDistance.apply(x, y)
        return align(cost, band, self.gamma, backend)


def _called(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    cost = function(x, y)
    wanted = (x.shape[0], x.shape[1], y.shape[1])
    if not isinstance(cost, Tensor) or cost.shape != wanted:
        got = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
        raise InputError(
            f"SoftDTWLoss: the cost function must return (B, N, M), here {wanted}, got {got}"
        )
    return cost
