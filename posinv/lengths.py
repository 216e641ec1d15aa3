"""The true lengths of a padded batch, and what is taken over them.

Lengths may be on the CPU while the batch is on a GPU: then no function here waits for the GPU.
"""

import torch
from torch import Tensor


def on_device(lengths: Tensor, longest: int, device: torch.device) -> Tensor:
    """Lengths as on a device, without waiting for it, nor copying those that are all the same."""
    if lengths.device.type == "cpu" and device.type != "cpu" and bool((lengths == longest).all()):
        return torch.full(lengths.shape, longest, device=device)
    return lengths.to(device, non_blocking=True)


def valid_mask(lengths: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """Return a bool mask ``(B, size)``, true at positions before each of ``lengths`` ``(B,)``.

    It is on ``device``, without which it is where the lengths are.
    """
    if device is not None:
        lengths = on_device(lengths, size, device)
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def mean_squared_distance(x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over valid frames of ``||x_i - y_i||^2``, ``(B,)``, of ``(B, F, D)`` each."""
    valid = valid_mask(lengths, x.size(1), x.device)
    return ((x - y).square().sum(dim=2) * valid).sum(dim=1) / valid.sum(dim=1)
