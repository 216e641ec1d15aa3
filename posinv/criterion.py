"""Enhancement criteria on the features of a frozen SSL model, as ESPnet enhancement losses.

Notation of arXiv 2601.21084: clean speech ``s``, enhanced speech ``e``, SSL model ``F``,
features ``X = F(s)`` (no gradient) and ``X' = F(e)`` (gradient into ``e``). All criteria take
utterances of different lengths in a batch and give what the utterances give one by one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from espnet2.enh.loss.criterions.time_domain import TimeDomainLoss

from posinv.errors import InputError
from posinv.lengths import mean_squared_distance
from posinv.perturb import SpeedPerturb, ZeroPad
from posinv.softdtw import SoftDTWLoss
from posinv.upstream import Frozen, SSLUpstream, check_layer, load_config


class SSLCriterion(TimeDomainLoss, ABC):
    """What the SSL criteria share: the frozen model, and the batch's lengths.

    The SSL model is loaded at the first call, so that enhancing with a trained model doesn't
    load it; it follows the input's device, stays in eval mode and out of checkpoints.

    Args:
        ssl: the SSL model, a hub name or a folder (see :class:`~posinv.upstream.SSLUpstream`).
        layer: hidden state to compare, 0 (before the transformer) to the last, or -1 for the last.
        name: the name in ESPnet's logs.
        only_for_test: compute in validation only.

    Attributes:
        utt_ids: ids of the utterances of the coming batch, which key the random draws; None
            numbers them. Set by posinv's enhancement task, since ESPnet's loss wrappers pass
            the two signals alone.
        lengths: their lengths ``(B,)`` in samples; None means that every row is full.

    Raises:
        InputError: no such model or layer.
    """

    def __init__(self, ssl: str, layer: int, name: str, only_for_test: bool) -> None:
        super().__init__(name, only_for_test=only_for_test)
        self.ssl = ssl
        self.layer = check_layer(load_config(ssl), layer)
        self.utt_ids: Sequence[str] | None = None
        self.lengths: torch.Tensor | None = None
        self._upstream: Frozen | None = None

    @property
    def upstream(self) -> Frozen:
        """The frozen SSL model, loaded when first asked for."""
        if self._upstream is None:
            self._upstream = Frozen(SSLUpstream(self.ssl))
        return self._upstream

    def features(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's features ``(B, F, D)``, zero past the frame lengths ``(B,)``."""
        hidden, frame_lengths = self.upstream(waves, lengths)
        return hidden[self.layer], frame_lengths

    def forward(self, ref: torch.Tensor, inf: torch.Tensor) -> torch.Tensor:
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
    def compare(
        self, ref: torch.Tensor, inf: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> torch.Tensor:
        """Return the loss ``(B,)`` of ``inf`` against ``ref``, both ``(B, T)``."""


class SSLMSE(SSLCriterion):
    """``ssl_mse``: mean over valid frames of ``||x_i - x'_i||^2``."""

    def __init__(
        self, ssl: str, layer: int = -1, name: str = "ssl_mse", only_for_test: bool = False
    ) -> None:
        super().__init__(ssl, layer, name, only_for_test)

    def compare(self, ref, inf, lengths, keys):
        """Compare frame by frame."""
        with torch.no_grad():
            x, frame_lengths = self.features(ref, lengths)
        x_enh, _ = self.features(inf, lengths)
        return mean_squared_distance(x, x_enh, frame_lengths)


class SSLMSEPad(SSLCriterion):
    """``ssl_mse_pad``: the reference is zero-padded, so that positions no longer match.

    Frame ``i + k`` of the padded reference is compared with frame ``i`` of the enhanced speech,
    ``k`` the hops in front; frames over padding don't count.

    Args:
        pad: smallest and largest share of the clean length that becomes zeros.
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
        self.pad = pad

    def compare(self, ref, inf, lengths, keys):
        """Compare frame by frame, the reference shifted back by its padding."""
        zero_pad = ZeroPad(*self.pad, hop=self.upstream.module.hop)
        padded, padded_lengths, hops = zero_pad(ref, lengths, keys)
        with torch.no_grad():
            x_padded, _ = self.features(padded, padded_lengths)
        x_enh, frame_lengths = self.features(inf, lengths)
        frames = hops[:, None] + torch.arange(x_enh.size(1), device=hops.device)  # B, F
        frames = frames.clamp(max=x_padded.size(1) - 1)[:, :, None]
        x = x_padded.gather(1, frames.expand(-1, -1, x_padded.size(2)))
        return mean_squared_distance(x, x_enh, frame_lengths)


class SSLSoftDTW(SSLCriterion):
    """``ssl_softdtw``: soft-DTW between ``X'`` and the features of the speed-perturbed reference.

    Args:
        factors: speeds the clean reference is played at.
        gamma: softness of the minimum, at least 0.
        divergence: subtract half the two self-alignments.
        normalize_features: scale each frame to unit L2 norm first.
        normalize_length: divide by the sum of the two frame counts, so that the loss is per
            frame; LASER doesn't.
        cost: ``sqeuclidean`` or ``cosine``.
        bandwidth: Sakoe-Chiba band in frames, or None.
        ssl, layer, name, only_for_test: see :class:`SSLCriterion`.
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
    ) -> None:
        super().__init__(ssl, layer, name, only_for_test)
        self.speed = SpeedPerturb(factors)
        self.loss = SoftDTWLoss(gamma, divergence, cost, bandwidth)
        self.normalize_features = normalize_features
        self.normalize_length = normalize_length

    def compare(self, ref, inf, lengths, keys):
        """Align the enhanced speech with the reference at another speed."""
        with torch.no_grad():
            x, x_lengths = self.features(*self.speed(ref, lengths, keys))
        x_enh, enh_lengths = self.features(inf, lengths)
        if self.normalize_features:
            x, x_enh = F.normalize(x, dim=2), F.normalize(x_enh, dim=2)
        loss = self.loss(x_enh, x, enh_lengths, x_lengths)
        return loss / (enh_lengths + x_lengths) if self.normalize_length else loss


class SSLXCorr(SSLCriterion):
    """``ssl_xcorr``: the negated soft maximum, over lags, of the mean cosine similarity.

    ``-t * log(mean_l exp(s_l / t))`` with ``s_l`` the mean over frames ``i`` of
    ``cos(x'_i, x_{i+l})`` and ``|l| <= max_lag``, as far as the utterance is long enough for the
    two to overlap. Between -1 (aligned at every lag) and 1.

    Args:
        max_lag: frames, at least 0.
        temperature: ``t``, positive; towards 0 it is the maximum.
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
        if max_lag < 0 or temperature <= 0:
            raise InputError(
                f"{name}: max_lag must be at least 0 and temperature positive: "
                f"{max_lag}, {temperature}"
            )
        self.max_lag = max_lag
        self.temperature = temperature

    def compare(self, ref, inf, lengths, keys):
        """Correlate the two feature sequences at every lag."""
        with torch.no_grad():
            x, frame_lengths = self.features(ref, lengths)
        x_enh, _ = self.features(inf, lengths)
        x, x_enh = F.normalize(x, dim=2), F.normalize(x_enh, dim=2)
        similarities = []
        for lag in range(-self.max_lag, self.max_lag + 1):
            # Frames past an utterance's end are zero, so they add nothing to the sum.
            overlap = max(0, x.size(1) - abs(lag))
            first, second = (x_enh, x) if lag >= 0 else (x, x_enh)
            products = first[:, :overlap] * second[:, abs(lag) : abs(lag) + overlap]
            count = frame_lengths - abs(lag)
            mean = products.sum(dim=(1, 2)) / count.clamp(min=1)
            similarities.append(mean.masked_fill(count < 1, -torch.inf))
        scaled = torch.stack(similarities, dim=1) / self.temperature  # B, lags
        lags = scaled.isfinite().sum(dim=1)
        return -self.temperature * (scaled.logsumexp(dim=1) - lags.log())


CRITERIA: dict[str, type[SSLCriterion]] = {
    "ssl_mse": SSLMSE,
    "ssl_mse_pad": SSLMSEPad,
    "ssl_softdtw": SSLSoftDTW,
    "ssl_xcorr": SSLXCorr,
}
