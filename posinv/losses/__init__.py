"""Losses on feature sequences, each tested on tensors alone: functions, and thin modules."""

from posinv.losses.modules import SSLMSE, ContrastiveIDM, SSLMSEPad, SSLSoftDTW, SSLXCorr

__all__ = ["SSLMSE", "ContrastiveIDM", "SSLMSEPad", "SSLSoftDTW", "SSLXCorr"]
