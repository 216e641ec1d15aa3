"""The true lengths of a padded batch.

If the batch is on a GPU and its lengths are on the CPU, no function here waits for the GPU.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posinv.errors import InputError

Lengths = Tensor | np.ndarray | Sequence[int]


def checked_lengths(
    name: str, lengths: Lengths | int | None, batch: int, longest: int, tensor: Tensor
) -> Tensor:
    """Return lengths as int64, checked against the batch of ``tensor``.

    The result is on the CPU, unless lengths and tensor are both on a GPU. Then it stays there, and
    as an error would have to wait for the GPU, a length out of range becomes 0 instead. Losses of
    that utterance are then NaN. The same holds in torch.compile and for lengths that
    torch.func.vmap maps over.

    Args:
        name: the lengths' name in error messages.
        lengths: (B,) integers in 1..longest; None for all ``longest``.
        batch: B.
        longest: size of the tensor's time dimension.
        tensor: the batch; error messages give its shape.

    Raises:
        InputError: lengths of another shape, not integers, or out of range.
    """
    of = f"for a tensor of shape {tuple(tensor.shape)}"
    if lengths is None:
        lengths = torch.full((batch,), longest)
        if longest > 0:
            return lengths
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(np.asarray(lengths))
        except (TypeError, ValueError):
            raise InputError(f"{name} must be ({batch},) integers {of}, got {lengths!r}") from None
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise InputError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise InputError(f"{name} must be ({batch},) {of}, got shape {tuple(lengths.shape)}")
    on_gpu = lengths.is_cuda and tensor.is_cuda
    lengths = lengths.detach().to(lengths.device if on_gpu else "cpu", torch.int64)
    if not is_known(lengths):
        return lengths.masked_fill((lengths < 1) | (lengths > longest), 0)
    for b in ((lengths < 1) | (lengths > longest)).nonzero().flatten().tolist()[:1]:
        allowed = f"in 1..{longest}" if longest else "at least 1"
        raise InputError(f"{name}[{b}] is {lengths[b]}, must be {allowed} {of}")
    return lengths


def is_known(lengths: Tensor) -> bool:
    """Whether the lengths can be read here: without waiting for a GPU, and not in a transform."""
    return (
        lengths.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_batchedtensor(lengths)
    )


def on_device(lengths: Tensor, longest: int, device: torch.device) -> Tensor:
    """Return lengths on a device without waiting for it, and without a copy if all are equal."""
    if device.type != "cpu" and is_known(lengths) and bool((lengths == longest).all()):
        return torch.full(lengths.shape, longest, device=device)
    return lengths.to(device, non_blocking=True)


def valid_mask(lengths: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """Return a bool mask ``(B, size)``, true at positions before each of ``lengths`` ``(B,)``.

    It is on ``device``, by default on that of the lengths.
    """
    if device is not None:
        lengths = on_device(lengths, size, device)
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """Return ``x (B, ..., T)`` with its padding, NaN included, replaced by zeros."""
    beyond = ~valid_mask(lengths, x.shape[-1], x.device)
    return x.masked_fill(beyond.view(len(x), *[1] * (x.dim() - 2), x.shape[-1]), 0.0)


def index_tensor(values: Sequence, device: torch.device) -> Tensor:
    """Return ``values`` as int64 on a device, without waiting for it.

    ``torch.tensor(values, device=...)``, and indexing by a list, wait for a GPU.
    """
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)
