"""How far a representation has collapsed: the spread of an utterance's frames.

Soft-DTW alone is lowest where all frames are the same vector; these figures show it coming.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from posinv.lengths import on_device, valid_mask


def frame_distance(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean Euclidean distance of an utterance's L2-normalised frames, pair by pair.

    Args:
        x: (B, F, D) features; frames beyond the lengths are not read.
        lengths: (B,) int, in 1..F.

    Returns:
        (B,) in [0, 2]; 0 where all frames have one direction, and for a single frame.
    """
    lengths = on_device(lengths, x.size(1), x.device)
    valid = valid_mask(lengths, x.size(1))
    x = F.normalize(x.float(), dim=2) * valid[:, :, None]
    # The exact distances: the expansion by products leaves 1e-4 between equal frames.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    total = (distance * (valid[:, :, None] & valid[:, None, :])).sum(dim=(1, 2))
    return total / (lengths * (lengths - 1)).clamp(min=1)


def effective_rank(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the effective rank of an utterance's L2-normalised frames.

    The exponential of the entropy of the normalised singular values (Roy & Vetterli, *The
    Effective Rank*, EUSIPCO 2007).

    Args:
        x: (B, F, D) features; frames beyond the lengths are not read.
        lengths: (B,) int, in 1..F.

    Returns:
        (B,) from 1, all frames on one line, to min(F, D).
    """
    ranks = []
    for row, length in zip(x.float(), lengths.tolist(), strict=True):
        singular = torch.linalg.svdvals(F.normalize(row[:length], dim=1))
        share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
        ranks.append(torch.special.entr(share).sum().exp())
    return torch.stack(ranks)
