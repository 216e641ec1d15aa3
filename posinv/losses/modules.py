"""The losses of :mod:`posinv.losses.functional` as modules, which hold their options."""

from torch import Tensor, nn

from posinv.lengths import Lengths
from posinv.losses import functional
from posinv.softdtw.loss import Cost, SoftDTWLoss


class SSLMSE(nn.Module):
    """:func:`~posinv.losses.functional.ssl_mse`, which describes the option.

    Raises:
        InputError: another reduction than ``mean`` or ``sum``.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        functional.check_mse("SSLMSE", reduction)
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Return the loss ``(B,)`` of ``x`` and ``y``, ``(B, F, D)`` each."""
        return functional.ssl_mse(x, y, lengths, self.reduction)


class SSLMSEPad(nn.Module):
    """:func:`~posinv.losses.functional.ssl_mse_pad`."""

    def forward(
        self, padded: Tensor, y: Tensor, hops: Lengths, lengths: Lengths | None = None
    ) -> Tensor:
        """Return the loss ``(B,)`` of ``padded (B, F', D)`` and ``y (B, F, D)``."""
        return functional.ssl_mse_pad(padded, y, hops, lengths)


class SSLSoftDTW(SoftDTWLoss):
    """:func:`~posinv.losses.functional.ssl_softdtw`, which describes the options.

    Raises:
        InputError: an option out of range.
    """

    def __init__(
        self,
        gamma: float = 0.1,
        divergence: bool = True,
        cost: Cost = "sqeuclidean",
        bandwidth: int | None = None,
        normalize_features: bool = True,
        normalize_length: bool = False,
        band: str = "slanted",
    ) -> None:
        super().__init__(
            gamma, divergence, cost, bandwidth, "auto", normalize_features, normalize_length, band
        )


class SSLXCorr(nn.Module):
    """:func:`~posinv.losses.functional.ssl_xcorr`, which describes the options.

    Raises:
        InputError: an option out of range.
    """

    def __init__(self, max_lag: int = 5, temperature: float = 0.1) -> None:
        super().__init__()
        functional.check_xcorr("SSLXCorr", max_lag, temperature)
        self.max_lag = max_lag
        self.temperature = temperature

    def forward(self, x: Tensor, y: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Return the loss ``(B,)`` of ``x`` and ``y``, ``(B, F, D)`` each."""
        return functional.ssl_xcorr(x, y, lengths, self.max_lag, self.temperature)


class ContrastiveIDM(nn.Module):
    """:func:`~posinv.losses.functional.contrastive_idm`, which describes the options.

    Raises:
        InputError: an option out of range.
    """

    def __init__(self, margin: float, window: int) -> None:
        super().__init__()
        functional.check_idm("ContrastiveIDM", margin, window)
        self.margin = margin
        self.window = window

    def extra_repr(self) -> str:
        """Return the options, for print."""
        return f"margin={self.margin}, window={self.window}"

    def forward(self, x: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Return the regulariser ``(B,)`` of ``x (B, F, D)``."""
        return functional.contrastive_idm(x, lengths, self.margin, self.window)
