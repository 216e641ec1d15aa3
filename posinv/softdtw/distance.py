"""Squared distances between the frames of two sequences, in full float32, with their gradients."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from posinv.errors import InputError
from posinv.lengths import Lengths, checked_lengths, on_device, valid_mask


def valid_features(
    name: str, x_name: str, x: Tensor, lengths_name: str, lengths: Lengths | None
) -> tuple[Tensor, Tensor]:
    """Return features in float32 or float64, zero beyond the lengths, and the checked lengths."""
    if not x.is_floating_point():
        raise InputError(f"{name}: {x_name} must be floating point, got {x.dtype}")
    lengths = checked_lengths(f"{name}: {lengths_name}", lengths, x.shape[0], x.shape[1], x)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    valid = valid_mask(lengths, x.shape[1], x.device)
    return x.masked_fill(~valid[:, :, None], 0.0), lengths


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


class SquaredDistance(torch.autograd.Function):
    """Squared distances of all pairs: (B, N, D) and (B, M, D) give (B, N, M).

    Only the features are saved for backward. The clamp at 0 corrects rounding and has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """Compute the distances."""
        ctx.save_for_backward(x, y)
        return _squared_distance(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients in both sequences."""
        x, y = ctx.saved_tensors
        with _no_autocast(x.device):
            grad_x = grad.sum(dim=2, keepdim=True) * x - _product(grad, y)
            grad_y = grad.sum(dim=1)[:, :, None] * y - _product(grad.mT, x)
        return 2 * grad_x, 2 * grad_y


class SquaredSelfDistance(torch.autograd.Function):
    """Squared distances of all pairs of a sequence's frames, with zeros on the diagonal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Compute the distances: (B, N, D) gives (B, N, N)."""
        ctx.save_for_backward(x)
        distance = _squared_distance(x, x)
        distance.diagonal(dim1=1, dim2=2).zero_()
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Compute the gradient."""
        (x,) = ctx.saved_tensors
        with _no_autocast(x.device):
            both = grad + grad.mT
            return 2 * (both.sum(dim=2, keepdim=True) * x - _product(both, x))


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, M) squared distances by the expansion: one batched product, and two sums in place."""
    with _no_autocast(x.device):
        x_square, y_square = x.square().sum(dim=2, keepdim=True), y.square().sum(dim=2)[:, None]
        if _reduced_precision(x):
            return (_product(x, y.mT).mul_(-2).add_(y_square).add_(x_square)).clamp_(min=0)
        return torch.baddbmm(y_square, x, y.mT, alpha=-2).add_(x_square).clamp_(min=0)


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
