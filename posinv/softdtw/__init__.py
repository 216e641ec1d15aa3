"""Soft-DTW: differentiable alignment of feature sequences."""

from posinv.softdtw.functional import soft_alignment, soft_dtw
from posinv.softdtw.loss import SoftDTWLoss

__all__ = ["SoftDTWLoss", "soft_alignment", "soft_dtw"]
