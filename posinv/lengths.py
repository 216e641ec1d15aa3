"""The true lengths of a padded batch, as a mask."""

from torch import Tensor, arange


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """Return a bool mask ``(B, size)``, true at positions before each of ``lengths`` ``(B,)``."""
    return arange(size, device=lengths.device) < lengths[:, None]
