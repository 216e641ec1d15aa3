"""Enhancement criteria on the features of a frozen SSL model, as ESPnet enhancement losses.

Notation of arXiv 2601.21084: clean speech ``s``, enhanced speech ``e``, SSL model ``F``,
features ``X = F(s)`` (no gradient) and ``X' = F(e)`` (gradient into ``e``). A batch may hold
utterances of different lengths: each gets the loss that it gets alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from espnet2.enh.loss.criterions.time_domain import TimeDomainLoss
from torch import Tensor, nn

from posinv.augment.pad import ZeroPad
from posinv.augment.speed import SpeedPerturb
from posinv.data.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.losses import SSLMSE, SSLMSEPad, SSLSoftDTW, SSLXCorr
from posinv.ssl.load import check_layer, hop, load_config
from posinv.ssl.upstream import Frozen, SSLUpstream


class SSLCriterion(TimeDomainLoss, ABC):
    """Base class of the SSL criteria: it holds the frozen SSL model and the batch's lengths.

    The SSL model is loaded at the first call, so enhancement with a trained model doesn't load it.
    It moves to the input's device, stays in eval mode and is not saved in checkpoints.

    Args:
        ssl: the SSL model, a hub name or a folder (see :class:`~posinv.ssl.upstream.SSLUpstream`).
        layer: hidden state to compare, 0 (before the transformer) to the last, or -1 for the last.
        name: the name in ESPnet's logs.
        only_for_test: compute in validation only.

    Attributes:
        utt_ids: utterance ids of the next batch; the random draws depend on them. None: the
            ids are 0, 1, and so on. posinv's enhancement task sets them before each call, since
            ESPnet's loss wrappers pass only the two signals.
        lengths: lengths ``(B,)`` of these utterances in samples. None: no row is padded.

    Raises:
        InputError: no such model or layer.
    """

    def __init__(self, ssl: str, layer: int, name: str, only_for_test: bool) -> None:
        super().__init__(name, only_for_test=only_for_test)
        self.ssl_name_or_path = ssl
        self.layer = check_layer(load_config(ssl), layer)
        self.utt_ids: Sequence[str] | None = None
        self.lengths: Tensor | None = None
        self._upstream: Frozen | None = None

    @property
    def upstream(self) -> Frozen:
        """The frozen SSL model, loaded at first use."""
        if self._upstream is None:
            self._upstream = Frozen(SSLUpstream(self.ssl_name_or_path))
        return self._upstream

    def features(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's features ``(B, F, D)``, zero past the frame lengths ``(B,)``."""
        return self.upstream(waves, lengths, layer=self.layer)

    def forward(self, ref: Tensor, inf: Tensor) -> Tensor:
        """Return the loss ``(B,)`` of enhanced ``inf (B, T)`` against clean ``ref (B, T)``.

        Raises:
            InputError: the shapes differ, or an utterance is shorter than one SSL frame.
        """
        if ref.shape != inf.shape or ref.dim() != 2:
            raise InputError(
                f"{self.name}: clean and enhanced speech must both be (B, T), "
                f"got {tuple(ref.shape)} and {tuple(inf.shape)}"
            )
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full((ref.size(0),), ref.size(1), device=ref.device)
        keys = self.utt_ids or [str(b) for b in range(ref.size(0))]
        return self.compare(ref, inf, lengths.to(ref.device), keys)

    @abstractmethod
    def compare(self, ref: Tensor, inf: Tensor, lengths: Tensor, keys: Sequence[str]) -> Tensor:
        """Return the loss ``(B,)`` of ``inf`` against ``ref``, both ``(B, T)``.

        Args:
            ref: clean speech.
            inf: enhanced speech.
            lengths: ``(B,)`` int, in samples.
            keys: the B utterance ids; the random draws depend on them.
        """


class CleanReferenceCriterion(SSLCriterion):
    """Base class of the criteria that use the clean speech as it is.

    Attributes:
        loss: a loss of the clean features, the enhanced features and their frame lengths.
    """

    loss: nn.Module

    def compare(self, ref: Tensor, inf: Tensor, lengths: Tensor, keys: Sequence[str]) -> Tensor:
        """Compare the features of both signals."""
        with torch.no_grad():
            x, frame_lengths = self.features(ref, lengths)
        x_enh, _ = self.features(inf, lengths)
        return self.loss(x, x_enh, frame_lengths)


class SSLMSECriterion(CleanReferenceCriterion):
    """``ssl_mse``: see :func:`~posinv.losses.functional.ssl_mse`.

    Args:
        ssl, layer, name, only_for_test: see :class:`SSLCriterion`.
    """

    def __init__(
        self, ssl: str, layer: int = -1, name: str = "ssl_mse", only_for_test: bool = False
    ) -> None:
        super().__init__(ssl, layer, name, only_for_test)
        self.loss = SSLMSE()


class SSLMSEPadCriterion(SSLCriterion):
    """``ssl_mse_pad``: the reference is zero-padded, so that matching positions doesn't help.

    See :class:`~posinv.augment.pad.ZeroPad` and :func:`~posinv.losses.functional.ssl_mse_pad`.

    Args:
        pad: how many zeros to add: smallest and largest share of the clean length.
        ssl, layer, name, only_for_test: see :class:`SSLCriterion`.
    """

    def __init__(
        self,
        ssl: str,
        layer: int = -1,
        pad: Sequence[float] = (0.02, 0.05),
        name: str = "ssl_mse_pad",
        only_for_test: bool = False,
    ) -> None:
        super().__init__(ssl, layer, name, only_for_test)
        if len(pad) != 2:
            raise InputError(f"{name}: pad must be two numbers, low and high: {pad}")
        low, high = pad
        self.zero_pad = ZeroPad(low, high, hop(load_config(ssl)))
        self.loss = SSLMSEPad()

    def compare(self, ref: Tensor, inf: Tensor, lengths: Tensor, keys: Sequence[str]) -> Tensor:
        """Compare frame by frame, with the reference shifted back by its padding."""
        padded, padded_lengths, hops = self.zero_pad(ref, lengths, keys)
        with torch.no_grad():
            x_padded, _ = self.features(padded, padded_lengths)
        x_enh, frame_lengths = self.features(inf, lengths)
        return self.loss(x_padded, x_enh, hops, frame_lengths)


class SSLSoftDTWCriterion(SSLCriterion):
    """``ssl_softdtw``: soft-DTW with the reference at another speed.

    See :class:`~posinv.augment.speed.SpeedPerturb` and
    :func:`~posinv.losses.functional.ssl_softdtw`.

    Args:
        factors: speeds of the clean reference; one is drawn for each utterance.
        gamma, divergence, cost, bandwidth, normalize_features, normalize_length, band: see
            :func:`~posinv.losses.functional.ssl_softdtw`.
        ssl, layer, name, only_for_test: see :class:`SSLCriterion`.

    Raises:
        InputError: a fixed band with a speed other than 1: an utterance that is long enough would
            differ from its reference by more frames than the band has.
    """

    def __init__(
        self,
        ssl: str,
        layer: int = -1,
        factors: Sequence[float] = (0.9, 1.0, 1.1),
        gamma: float = 0.1,
        divergence: bool = True,
        normalize_features: bool = True,
        normalize_length: bool = False,
        cost: str = "sqeuclidean",
        bandwidth: int | None = None,
        name: str = "ssl_softdtw",
        only_for_test: bool = False,
        band: str = "slanted",
    ) -> None:
        super().__init__(ssl, layer, name, only_for_test)
        self.speed = SpeedPerturb(factors)
        self.loss = SSLSoftDTW(
            gamma, divergence, cost, bandwidth, normalize_features, normalize_length, band
        )
        if bandwidth is not None and band == "fixed":
            self._check_fixed_band(bandwidth, hop(load_config(ssl)) / SAMPLING_RATE)

    def _check_fixed_band(self, bandwidth: int, seconds: float) -> None:
        """Raise InputError if some utterance can be too long for the band; a frame has seconds."""
        change = {factor: abs(1 / factor - 1) for factor in self.speed.factors}
        factor = max(change, key=lambda factor: change[factor])
        if change[factor]:
            frames = int(bandwidth / change[factor])
            raise InputError(
                f"{self.name}: bandwidth {bandwidth} of a fixed band is too narrow for utterances"
                f" over {frames * seconds:.1f} s ({frames} frames) at speed {float(factor):g} of"
                " factors: set band: slanted, which fits all lengths, or factors: [1.0]"
            )

    def compare(self, ref: Tensor, inf: Tensor, lengths: Tensor, keys: Sequence[str]) -> Tensor:
        """Align the enhanced speech with the reference at another speed."""
        with torch.no_grad():
            x, x_lengths = self.features(*self.speed(ref, lengths, keys))
        x_enh, enh_lengths = self.features(inf, lengths)
        return self.loss(x_enh, x, enh_lengths, x_lengths)


class SSLXCorrCriterion(CleanReferenceCriterion):
    """``ssl_xcorr``: see :func:`~posinv.losses.functional.ssl_xcorr`.

    Args:
        max_lag: largest lag in frames, at least 0.
        temperature: temperature of the soft maximum, positive.
        ssl, layer, name, only_for_test: see :class:`SSLCriterion`.
    """

    def __init__(
        self,
        ssl: str,
        layer: int = -1,
        max_lag: int = 5,
        temperature: float = 0.1,
        name: str = "ssl_xcorr",
        only_for_test: bool = False,
    ) -> None:
        super().__init__(ssl, layer, name, only_for_test)
        self.loss = SSLXCorr(max_lag, temperature)


CRITERIA: dict[str, type[SSLCriterion]] = {
    "ssl_mse": SSLMSECriterion,
    "ssl_mse_pad": SSLMSEPadCriterion,
    "ssl_softdtw": SSLSoftDTWCriterion,
    "ssl_xcorr": SSLXCorrCriterion,
}
