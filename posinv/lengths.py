"""The true lengths of a padded batch, and what is taken over them."""

from torch import Tensor, arange


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """Return a bool mask ``(B, size)``, true at positions before each of ``lengths`` ``(B,)``."""
    return arange(size, device=lengths.device) < lengths[:, None]


def mean_squared_distance(x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over valid frames of ``||x_i - y_i||^2``, ``(B,)``, of ``(B, F, D)`` each."""
    distance = (x - y).square().sum(dim=2)
    return (distance * valid_mask(lengths, x.size(1))).sum(dim=1) / lengths
