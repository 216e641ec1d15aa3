"""Losses on feature sequences: functions of features and lengths, and thin modules over them."""

from posinv.losses.modules import SSLMSE, ContrastiveIDM, SSLMSEPad, SSLSoftDTW, SSLXCorr

__all__ = ["SSLMSE", "ContrastiveIDM", "SSLMSEPad", "SSLSoftDTW", "SSLXCorr"]
