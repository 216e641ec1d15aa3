"""Soft-DTW: differentiable alignment of feature sequences, and the losses made of it."""

from posinv.softdtw.functional import soft_alignment, soft_dtw
from posinv.softdtw.loss import ContrastiveIDM, SoftDTWLoss

__all__ = ["ContrastiveIDM", "SoftDTWLoss", "soft_alignment", "soft_dtw"]
