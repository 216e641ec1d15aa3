"""Squared distances between the frames of two sequences, in full float32, with their gradients."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from posinv.errors import InputError
from posinv.lengths import Lengths, checked_lengths, is_known, on_device, valid_mask
from posinv.softdtw.band import ROWS, Band
from posinv.softdtw.memory import empty, empty_like
from posinv.softdtw.transforms import BatchFunction, in_transform

Features = Tensor | PackedSequence


def as_batch(
    name: str, x_name: str, x: Features, lengths_name: str, lengths: Lengths | int | None
) -> tuple[Tensor, Lengths | int | None, bool]:
    """Return features as a batch (B, F, D), its lengths, and whether they were one sequence (F, D).

    Raises:
        InputError: lengths beside a PackedSequence, which has its own.
    """
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise InputError(
                f"{name}: {x_name} is a PackedSequence, which has its lengths: leave out"
                f" {lengths_name}"
            )
        return *pad_packed_sequence(x, batch_first=True), False
    if x.dim() != 2:
        return x, lengths, False
    return x[None], None if lengths is None else torch.as_tensor(lengths).reshape(1), True


def valid_features(
    name: str, x_name: str, x: Tensor, lengths_name: str, lengths: Lengths | int | None
) -> tuple[Tensor, Tensor]:
    """Return features in float32 or float64, zero beyond the lengths, and the checked lengths."""
    if not x.is_floating_point():
        raise InputError(f"{name}: {x_name} must be floating point, got {x.dtype}")
    lengths = checked_lengths(f"{name}: {lengths_name}", lengths, x.shape[0], x.shape[1], x)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if not (is_known(lengths) and bool((lengths == x.shape[1]).all())):
        valid = valid_mask(lengths, x.shape[1], x.device)
        x = x.masked_fill(~valid[:, :, None], 0.0)
    return x, lengths


def mean_frame(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean frame of each utterance, (B, 1, D).

    Features minus a mean frame have the same distances, so it takes no gradient. But the expansion
    of the squared distance loses fewer digits near the origin.
    """
    lengths = on_device(lengths, x.shape[1], x.device)
    return x.detach().sum(dim=1, keepdim=True) / lengths[:, None, None]


def unit_frames(x: Tensor) -> Tensor:
    """Return frames of L2 norm 1; a frame of zeros stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


class SquaredDistance(BatchFunction):
    """Squared distances of all pairs: (B, N, D) and (B, M, D) give (B, N, M).

    Only the features are saved for backward. The clamp at 0 corrects rounding and has no gradient.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        """Compute the distances."""
        return _squared_distance(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save the features."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients in both sequences."""
        x, y = ctx.saved_tensors
        grad_x = _weighted_differences(grad, grad.sum(dim=2), x, y, 2)
        return grad_x, _weighted_differences(grad.mT, grad.sum(dim=1), y, x, 2)


class SquaredSelfDistance(BatchFunction):
    """Squared distances of all pairs of a sequence's frames, with zeros on the diagonal.

    The gradient that arrives must be symmetric, as that of any function is that does not change if
    rows and columns change places.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Compute the distances: (B, N, D) gives (B, N, N)."""
        distance = _squared_distance(x, x)
        distance.diagonal(dim1=1, dim2=2).zero_()
        return distance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save the features."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Compute the gradient."""
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or in_transform(grad):  # a derivative of it is not symmetric
            both = grad + grad.mT
            return _weighted_differences(both, both.sum(dim=2), x, x, 2)
        return _weighted_differences(grad, grad.sum(dim=2), x, x, 4)


def _weighted_differences(w: Tensor, sums: Tensor, x: Tensor, y: Tensor, factor: int) -> Tensor:
    """Return factor times the sum over j of w_ij (x_i - y_j), (B, N, D).

    Args:
        w: (B, N, M).
        sums: (B, N), the sums over its columns.
        x: (B, N, D).
        y: (B, M, D).
        factor: of all.
    """
    with _no_autocast(x.device):
        if torch.is_grad_enabled() or in_transform(w) or _reduced_precision(x):
            return factor * (sums[:, :, None] * x - _product(w, y))
        out = empty_like(x)
        torch.mul(x, (factor * sums)[:, :, None], out=out)
        return out.baddbmm_(w, y, alpha=-factor)


def band_distance(x: Tensor, y: Tensor, band: Band) -> Tensor:
    """Squared distances of the pairs inside a band, stored as :class:`Band` says: (B, N, W).

    Where x is y, those of the diagonal are zero.
    """
    with _no_autocast(x.device):
        # |x|^2 + |y|^2 - 2 x y is one product of longer frames.
        x_square, y_square = (z.square().sum(dim=2, keepdim=True) for z in (x, y))
        left = torch.cat([-2 * x, x_square, torch.ones_like(x_square)], dim=2)
        right = torch.cat([y, torch.ones_like(y_square), y_square], dim=2)
        first = band.first.to(x.device, non_blocking=True)
        distance = _BandProduct.apply(left, right, first, band.width)
        distance = distance - distance.detach().clamp(max=0)  # a clamp at 0 without gradient
        if x is y:
            row = torch.arange(band.N, device=x.device)[:, None]
            distance = distance.masked_fill(band.columns(x.device) == row, 0.0)
        return distance


class _BandProduct(BatchFunction):
    """a b^T inside a band: (B, N, D) and (B, M, D) give (B, N, W).

    This and the two products below are each other's derivatives. first is (B, blocks), the first
    stored column of each block of rows.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, first: Tensor, width: int) -> Tensor:
        out = a.new_empty(*a.shape[:2], width)
        for rows, where in _blocks(a.shape[1], first, width):
            out[:, rows] = _product(a[:, rows], b[where].mT)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        a, b, first, _ = inputs
        ctx.save_for_backward(a, b, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, first = ctx.saved_tensors
        grad_b = _TransposedBandTimes.apply(grad, a, first, b.shape[1])
        return _BandTimes.apply(grad, b, first), grad_b, None, None


class _BandTimes(BatchFunction):
    """A band's matrices times b: (B, N, W) and (B, M, D) give (B, N, D)."""

    @staticmethod
    def forward(matrix: Tensor, b: Tensor, first: Tensor) -> Tensor:
        out = b.new_empty(len(matrix), matrix.shape[1], b.shape[2])
        for rows, where in _blocks(matrix.shape[1], first, matrix.shape[2]):
            out[:, rows] = _product(matrix[:, rows], b[where])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, b, first = ctx.saved_tensors
        grad_b = _TransposedBandTimes.apply(matrix, grad, first, b.shape[1])
        return _BandProduct.apply(grad, b, first, matrix.shape[2]), grad_b, None


class _TransposedBandTimes(BatchFunction):
    """A band's transposed matrices times a: (B, N, W) and (B, N, D) give (B, M, D)."""

    @staticmethod
    def forward(matrix: Tensor, a: Tensor, first: Tensor, M: int) -> Tensor:
        out = a.new_zeros(len(matrix), M, a.shape[2])
        for rows, where in _blocks(matrix.shape[1], first, matrix.shape[2]):
            out[where] += _product(matrix[:, rows].mT, a[:, rows])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, a, first = ctx.saved_tensors
        grad_matrix = _BandProduct.apply(a, grad, first, matrix.shape[2])
        return grad_matrix, _BandTimes.apply(matrix, grad, first), None, None


def _blocks(N: int, first: Tensor, width: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Blocks of rows, and where in (B, M) their stored columns are."""
    batch = torch.arange(len(first), device=first.device)[:, None]
    for k, top in enumerate(range(0, N, ROWS)):
        columns = first[:, k, None] + torch.arange(width, device=first.device)
        yield slice(top, top + ROWS), (batch, columns)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, M) squared distances by the expansion: one batched product, the rest in place."""
    with _no_autocast(x.device):
        x_square, y_square = x.square().sum(dim=2, keepdim=True), y.square().sum(dim=2)[:, None]
        if _reduced_precision(x) or in_transform(x):
            distance = _product(x, y.mT)
        else:
            distance = empty((len(x), x.shape[1], y.shape[1]), x)
            torch.bmm(x, y.mT, out=distance)
        return distance.mul_(-2).add_(y_square).add_(x_square).clamp_(min=0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in full float32, whatever torch's precision setting."""
    if _reduced_precision(a):
        return (a.double() @ b.double()).float()
    return a @ b


def _reduced_precision(x: Tensor) -> bool:
    """Whether torch would multiply these float32 matrices as TF32 or bfloat16.

    Either loses the distances of nearly equal frames. The setting belongs to the process, where
    another thread may be multiplying, so it stays as it is; products are then in float64.
    """
    backends = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return x.dtype == torch.float32 and backends.matmul.fp32_precision in ("tf32", "bf16")


def _no_autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, enabled=False)
