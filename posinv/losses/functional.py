"""Losses and measures on feature sequences: one value for each utterance.

Features are (B, F, D), floating point of any width; half precision is computed in float32. Lengths
are (B,) integers in 1..F (a tensor, an array or a list), or None for all F. Frames beyond an
utterance's length are never read, so a batch gives the same values as its utterances one by one.
"""

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from posinv.errors import InputError
from posinv.lengths import Lengths, on_device, valid_mask
from posinv.softdtw.distance import Features, SquaredSelfDistance, mean_frame, valid_features
from posinv.softdtw.loss import Cost, SoftDTWLoss


def ssl_mse(
    x: Tensor, y: Tensor, lengths: Lengths | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Squared distance, mean over frames :math:`\frac1n \sum_i \|x_i - y_i\|^2`, or their sum.

    The mean is the plain criterion of arXiv 2601.21084. The sum is the MSE of NR-SSFT.

    Args:
        x: (B, F, D) features of one signal.
        y: (B, F, D) features of the other.
        lengths: (B,) frames of both.
        reduction: ``mean`` or ``sum`` over frames.

    Returns:
        (B,).

    Raises:
        InputError: another reduction, or shapes or lengths that do not fit.
    """
    check_mse("ssl_mse", reduction)
    x, y, lengths = _pair("ssl_mse", x, y, lengths)
    total = (x - y).square().sum(dim=(1, 2))
    return total if reduction == "sum" else total / on_device(lengths, x.shape[1], x.device)


def check_mse(name: str, reduction: str) -> None:
    """Raise InputError unless the option of :func:`ssl_mse` is one of those it has."""
    if reduction not in ("mean", "sum"):
        raise InputError(f"{name}: reduction must be mean or sum: {reduction!r}")


def ssl_mse_pad(padded: Tensor, y: Tensor, hops: Lengths, lengths: Lengths | None = None) -> Tensor:
    """:func:`ssl_mse` with a reference that is zero-padded in front (arXiv 2601.21084).

    Frame ``i + hops`` of the padded reference is compared with frame ``i`` of ``y``. Frames of the
    padding are not compared.

    Args:
        padded: (B, F', D) features of the padded reference, F' >= hops + lengths.
        y: (B, F, D) features of the other signal.
        hops: (B,) frames of padding in front, >= 0.
        lengths: (B,) frames of ``y``.

    Returns:
        (B,).

    Raises:
        InputError: shapes or lengths that do not fit; a reference that ends before ``y``.
    """
    y, lengths = _features("ssl_mse_pad", "y", y, "lengths", lengths)
    if padded.dim() != 3 or padded.shape[::2] != y.shape[::2]:
        raise InputError(
            "ssl_mse_pad: padded must be (B, F', D) and y (B, F, D), got shapes "
            f"{tuple(padded.shape)} and {tuple(y.shape)}"
        )
    hops = torch.as_tensor(hops)
    if hops.device.type == lengths.device.type == "cpu":
        for b in ((hops < 0) | (hops + lengths > padded.shape[1])).nonzero().flatten().tolist()[:1]:
            raise InputError(
                f"ssl_mse_pad: hops[{b}] is {hops[b]}: the padded reference has "
                f"{padded.shape[1]} frames, {lengths[b]} are compared"
            )
    frames = on_device(hops, -1, y.device)[:, None] + torch.arange(y.shape[1], device=y.device)
    frames = frames.clamp(max=padded.shape[1] - 1)[:, :, None]  # B, F, 1
    return ssl_mse(padded.gather(1, frames.expand(-1, -1, padded.shape[2])), y, lengths)


def ssl_softdtw(
    x: Features,
    y: Features,
    x_lengths: Lengths | int | None = None,
    y_lengths: Lengths | int | None = None,
    gamma: float = 0.1,
    divergence: bool = True,
    cost: Cost = "sqeuclidean",
    bandwidth: int | None = None,
    normalize_features: bool = True,
    normalize_length: bool = False,
    band: str = "slanted",
) -> Tensor:
    """Soft-DTW of two feature sequences (arXiv 2601.21084, with LASER's settings).

    Args:
        x: (B, N, D) features of one signal; also (N, D), or a PackedSequence.
        y: (B, M, D) features of the other, such as a reference at another speed.
        x_lengths: (B,) frames of ``x``.
        y_lengths: (B,) frames of ``y``.
        gamma: see :class:`~posinv.softdtw.SoftDTWLoss`, like the options below.
        divergence: subtract half the two self-alignments.
        cost: cost of two frames.
        bandwidth: half the width of a band in frames, or None.
        normalize_features: scale each frame to unit L2 norm first.
        normalize_length: divide by the sum of the two frame counts. LASER doesn't.
        band: "slanted", around the line from the first to the last cell, or "fixed".

    Returns:
        (B,).

    Raises:
        InputError: an option out of range, or shapes or lengths that do not fit.
    """
    loss = SoftDTWLoss(
        gamma, divergence, cost, bandwidth, "auto", normalize_features, normalize_length, band
    )
    return loss(x, y, x_lengths, y_lengths)


def ssl_xcorr(
    x: Tensor,
    y: Tensor,
    lengths: Lengths | None = None,
    max_lag: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    r"""Negated soft maximum, over lags, of the mean cosine similarity.

    :math:`-t \log(\frac1L \sum_l e^{s_l / t})`, with :math:`s_l` the mean over frames of
    :math:`\cos(y_i, x_{i+l})`, over the L lags :math:`|l|` <= ``max_lag`` at which the two
    overlap. arXiv 2601.21084 only outlines this criterion; the formula is ours.

    Args:
        x: (B, F, D) features of one signal.
        y: (B, F, D) features of the other.
        lengths: (B,) frames of both.
        max_lag: frames, >= 0.
        temperature: t, positive; towards 0 it is the maximum.

    Returns:
        (B,), from -1 (aligned at every lag) to 1.

    Raises:
        InputError: an option out of range, or shapes or lengths that do not fit.
    """
    check_xcorr("ssl_xcorr", max_lag, temperature)
    x, y, lengths = _pair("ssl_xcorr", x, y, lengths)
    x, y = F.normalize(x, dim=2), F.normalize(y, dim=2)
    lengths = on_device(lengths, x.shape[1], x.device)
    similarities = []
    for lag in range(-max_lag, max_lag + 1):
        # Frames beyond the lengths are zero and add nothing to the sum.
        overlap = max(0, x.size(1) - abs(lag))
        first, second = (y, x) if lag >= 0 else (x, y)
        products = first[:, :overlap] * second[:, abs(lag) : abs(lag) + overlap]
        count = lengths - abs(lag)
        mean = products.sum(dim=(1, 2)) / count.clamp(min=1)
        similarities.append(mean.masked_fill(count < 1, -torch.inf))
    scaled = torch.stack(similarities, dim=1) / temperature  # B, lags
    lags = scaled.isfinite().sum(dim=1)
    return -temperature * (scaled.logsumexp(dim=1) - lags.log())


def check_xcorr(name: str, max_lag: int, temperature: float) -> None:
    """Raise InputError unless the options of :func:`ssl_xcorr` are in range."""
    if max_lag < 0 or temperature <= 0:
        raise InputError(
            f"{name}: max_lag must be at least 0 and temperature positive: {max_lag}, {temperature}"
        )


def contrastive_idm(
    x: Tensor, lengths: Lengths | None = None, margin: float = 1.1, window: int = 0
) -> Tensor:
    r"""Contrastive inverse difference moment: pushes apart frames that are far apart in time.

    .. math:: \frac1{n^2} \sum_{ij} [|i-j| > w]\, w_{ij} \max(0, \lambda - d_{ij})
        + [|i-j| \le w]\, d_{ij} / w_{ij}, \quad w_{ij} = (i-j)^2 + 1

    with :math:`d_{ij}` the Euclidean distance of frames i and j (Haresh et al., *Learning by
    Aligning Videos in Time*, CVPR 2021, equation 7; the regulariser of LASER). At distance zero
    the gradient is taken as zero.

    Args:
        x: (B, F, D) features.
        lengths: (B,) frames.
        margin: the distance, >= 0, beyond which frames far apart in time cost nothing.
        window: frames, >= 0: up to this lag frames are pulled together, beyond it pushed apart.

    Returns:
        (B,).

    Raises:
        InputError: an option out of range, or shapes or lengths that do not fit.
    """
    check_idm("contrastive_idm", margin, window)
    x, lengths = _features("contrastive_idm", "x", x, "lengths", lengths)
    squared = SquaredSelfDistance.apply(x - mean_frame(x, lengths))
    apart = squared > 0
    distance = torch.where(apart, squared, 1.0).sqrt() * apart
    frame = torch.arange(x.shape[1], device=x.device)
    lag = frame[:, None] - frame  # F, F
    weight = (lag.square() + 1).to(x.dtype)
    term = torch.where(
        lag.abs() > window, weight * (margin - distance).clamp(min=0), distance / weight
    )
    lengths = on_device(lengths, x.shape[1], x.device)
    valid = frame < lengths[:, None]  # B, F
    total = (term * (valid[:, :, None] & valid[:, None, :])).sum(dim=(1, 2))
    return total / lengths.square()


def check_idm(name: str, margin: float, window: int) -> None:
    """Raise InputError unless the options of :func:`contrastive_idm` are in range."""
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"{name}: margin must be finite and >= 0, got {margin}")
    try:
        valid = operator.index(window) >= 0
    except TypeError:
        valid = False
    if not valid:
        raise InputError(f"{name}: window must be an integer >= 0, got {window}")


def frame_distance(x: Tensor, lengths: Lengths | None = None) -> Tensor:
    """Mean Euclidean distance over all pairs of an utterance's L2-normalised frames.

    It is 0 for a collapsed representation, where all frames are one vector. Soft-DTW alone is
    lowest there.

    Args:
        x: (B, F, D) features.
        lengths: (B,) frames.

    Returns:
        (B,) in [0, 2]; 0 where all frames have one direction, and for a single frame.

    Raises:
        InputError: shapes or lengths that do not fit.
    """
    x, lengths = _features("frame_distance", "x", x, "lengths", lengths)
    lengths = on_device(lengths, x.size(1), x.device)
    valid = valid_mask(lengths, x.size(1))
    x = F.normalize(x, dim=2)
    # Exact distances: the expansion by products gives 1e-4 between equal frames.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    total = (distance * (valid[:, :, None] & valid[:, None, :])).sum(dim=(1, 2))
    return total / (lengths * (lengths - 1)).clamp(min=1)


def effective_rank(x: Tensor, lengths: Lengths | None = None) -> Tensor:
    """Effective rank of an utterance's L2-normalised frames.

    The exponential of the entropy of the normalised singular values (Roy & Vetterli, *The
    Effective Rank*, EUSIPCO 2007). It is 1 for a collapsed representation.

    Args:
        x: (B, F, D) features.
        lengths: (B,) frames.

    Returns:
        (B,) from 1, all frames on one line, to min(F, D); NaN of features that are not finite.

    Raises:
        InputError: shapes or lengths that do not fit.
    """
    x, lengths = _features("effective_rank", "x", x, "lengths", lengths)
    ranks = []
    for row, length in zip(x, lengths.tolist(), strict=True):
        if not row[:length].isfinite().all():  # svdvals would raise an error
            ranks.append(row.new_full((), torch.nan))
            continue
        singular = torch.linalg.svdvals(F.normalize(row[:length], dim=1))
        share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
        ranks.append(torch.special.entr(share).sum().exp())
    return torch.stack(ranks)


def _pair(
    name: str, x: Tensor, y: Tensor, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return two sequences of the same lengths as :func:`_features` returns one."""
    if x.shape != y.shape:
        raise InputError(
            f"{name}: x and y must both be (B, F, D), got shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    x, lengths = _features(name, "x", x, "lengths", lengths)
    y, _ = _features(name, "y", y, "lengths", lengths)
    return x, y, lengths


def _features(
    name: str, x_name: str, x: Tensor, lengths_name: str, lengths: Lengths | None
) -> tuple[Tensor, Tensor]:
    if x.dim() != 3:
        raise InputError(f"{name}: {x_name} must be (B, F, D), got shape {tuple(x.shape)}")
    return valid_features(name, x_name, x, lengths_name, lengths)
