"""ESPnet ASR front ends over frozen models: ``ssl``, and ``enh_ssl`` with enhancement before it.

Both return SUPERB's weighted sum of the SSL model's layers, or one layer. The weights are learned;
they are the front ends' only parameters. The models before them are frozen, but a gradient goes
through them to the waveform where something in front is trained, as in ESPnet's ``enh_s2t``. The
front end ``layers`` is the weighted sum alone.
"""

from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import cast

import humanfriendly
import torch
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from espnet2.enh.diffusion_enh import ESPnetDiffusionModel

from posinv.augment.speed import resample
from posinv.data.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.espnet.layer_cache import LayerCache, MemoryCache, content_key
from posinv.espnet.load import load_enhancement_model
from posinv.lengths import zero_beyond
from posinv.ssl.upstream import Frozen, SSLUpstream


class LayersFrontend(AbsFrontend):
    """``layers``: layers that were computed before, summed with softmax weights.

    Args:
        size: feature dimension.
        num_layers: number of layers; None: one layer, which is returned as it is.
    """

    def __init__(self, size: int, num_layers: int | None) -> None:
        super().__init__()
        self.feature_size = size
        self.weights = None if num_layers is None else torch.nn.Parameter(torch.zeros(num_layers))

    def output_size(self) -> int:
        """Return the feature dimension."""
        return self.feature_size

    def forward(
        self, input: torch.Tensor, input_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of layers.

        Args:
            input: the layers ``(B, F, L, D)``.
            input_lengths: frame counts ``(B,)``.

        Returns:
            The features ``(B, F, D)`` and the frame counts ``(B,)``.
        """
        return self.weighted_sum(input.permute(2, 0, 1, 3)), input_lengths

    def weighted_sum(self, layers: torch.Tensor) -> torch.Tensor:
        """Return the features ``(B, F, D)`` of layers ``(L, B, F, D)``."""
        if self.weights is None:
            return layers[0]
        return torch.einsum("l,lbfd->bfd", self.weights.softmax(dim=0), layers)


class SSLFrontend(LayersFrontend):
    """``ssl``: a frozen SSL model's layers, summed with softmax weights (SUPERB, arXiv 2105.01051).

    The SSL model is not saved in the checkpoint, since the configuration names it.

    Args:
        ssl: the SSL model, a hub name or a folder (see :class:`~posinv.ssl.upstream.SSLUpstream`).
        cache_gb: size in GiB of a cache for the layers of training and validation utterances;
            0 for no cache. From the second epoch on, an utterance in the cache isn't encoded
            again. With a cache, utterances are encoded one at a time, so that their layers don't
            depend on the batch. It helps only where the audio is the same in every epoch. Where
            the waveforms need a gradient, the cache is neither read nor written.
        layer: one layer in place of the weighted sum: 0 (before the transformer) to the last, or
            -1 for the last. None: the weighted sum of all.
        fs: sampling rate of the input in Hz, a number or as ESPnet writes it (``16k``). Other
            rates than 16 kHz are resampled.

    Raises:
        InputError: no such model or layer, a negative ``cache_gb``, or a rate that is none or
            has no practicable ratio to 16 kHz.
    """

    def __init__(
        self,
        ssl: str,
        cache_gb: float = 0.0,
        layer: int | None = None,
        fs: int | str = SAMPLING_RATE,
    ) -> None:
        if cache_gb < 0:
            raise InputError(f"frontend_conf: cache_gb must be at least 0: {cache_gb}")
        speed = _ratio(fs)
        with torch.random.fork_rng(devices=[]):  # a head's weights must not depend on its loading
            upstream = SSLUpstream(ssl)
        super().__init__(upstream.output_size, upstream.num_layers if layer is None else None)
        self.speed = speed
        self.layer = None if layer is None else upstream.check_layer(layer)
        self.upstream = Frozen(upstream)
        self.cache: LayerCache | None = MemoryCache(cache_gb * 2**30) if cache_gb else None
        self._keys: dict[Hashable, str] = {}  # of the utterances that were named

    def forward(
        self, input: torch.Tensor, input_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the SSL model's layers, or the one chosen.

        Args:
            input: waveforms ``(B, T)`` at the rate ``fs``.
            input_lengths: their lengths ``(B,)`` in samples.

        Returns:
            The features ``(B, F, D)``, zero past each utterance's frames, and the frame counts
            ``(B,)``.

        Raises:
            InputError: an utterance is shorter than one frame.
        """
        layers, frame_lengths = self.layers(input, input_lengths)
        return self.weighted_sum(layers), frame_lengths

    def layers(
        self,
        input: torch.Tensor,
        input_lengths: torch.Tensor,
        names: Sequence[Hashable] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`forward` sums, from the cache if there is one.

        Args:
            input, input_lengths: see :meth:`forward`.
            names: by which :meth:`layers_of` is to find the utterances in the cache. Give them only
                if the utterance with this name is always the same.

        Returns:
            All layers ``(L+1, B, F, D)``, or one ``(1, B, F, D)``, and the frame counts ``(B,)``.

        Raises:
            InputError: an utterance is shorter than one frame.
        """
        waves, lengths = self._at_16_khz(input, input_lengths)
        if self.cache is None or _needs_gradient(waves):
            return self.encode(waves, lengths)
        keys, utterances = [], []
        for wave, length in zip(waves, lengths.tolist(), strict=True):
            keys.append(content_key(wave[:length]))
            utterances.append(self._layers(self.cache, keys[-1], wave[:length]))
        if names is not None:
            self._keys.update(zip(names, keys, strict=True))
        return self._pad(utterances, waves)

    def has(self, names: Iterable[Hashable]) -> bool:
        """Tell whether the layers of all these utterances are in the cache."""
        return all(self._find(name) is not None for name in names)

    def layers_of(
        self, names: Iterable[Hashable], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layers of utterances that the cache :meth:`has`, as :meth:`layers` does.

        Args:
            names: of the utterances, as given to :meth:`layers`.
            like: a tensor with the type and device that the layers are to have.
        """
        return self._pad([cast(torch.Tensor, self._find(name)) for name in names], like)

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the number of frames of each utterance, given its length in samples at rate fs."""
        return self._ssl().frame_lengths(self._length_at_16_khz(samples))

    def digest(self) -> str:
        """Return a hexadecimal digest of all that determines the layers, except the audio."""
        ssl = self._ssl()
        config = ssl.config.to_dict() | {"_name_or_path": ""}
        return _digest(f"{type(self).__name__} {self.layer} {ssl.normalize} {config}", ssl)

    def encode(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all layers ``(L+1, B, F, D)``, or one ``(1, B, F, D)``, and frame counts ``(B,)``.

        Autograd records nothing unless the waveforms need a gradient.
        """
        layers, frame_lengths = self.upstream(waves, lengths, layer=self.layer)
        return (layers if self.layer is None else layers[None]), frame_lengths

    def _at_16_khz(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.speed == 1:
            return waves, lengths
        waves = resample(zero_beyond(waves, lengths), self.speed).to(waves.dtype)
        return waves, self._length_at_16_khz(lengths)

    def _ssl(self) -> SSLUpstream:
        return cast(SSLUpstream, self.upstream.module)

    def _length_at_16_khz(self, lengths: torch.Tensor) -> torch.Tensor:
        return -(-lengths * self.speed.denominator // self.speed.numerator)

    def _find(self, name: Hashable) -> torch.Tensor | None:
        return None if self.cache is None else self.cache.get(self._keys.get(name, ""))

    def _layers(self, cache: LayerCache, key: str, wave: torch.Tensor) -> torch.Tensor:
        """Return one utterance's layers ``(L+1, F, D)``, or one, from the cache if it has them."""
        layers = cache.get(key)
        if layers is None:
            lengths = torch.tensor([wave.numel()], device=wave.device)
            layers = cache.put(key, self.encode(wave[None], lengths)[0][:, 0])
        return layers

    def _pad(
        self, utterances: Sequence[torch.Tensor], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frames = torch.tensor([layers.size(1) for layers in utterances], device=like.device)
        hidden = like.new_zeros(
            utterances[0].size(0), len(utterances), int(frames.max()), self.output_size()
        )
        for b, layers in enumerate(utterances):
            hidden[:, b, : layers.size(1)] = layers
        return hidden, frames


class EnhSSLFrontend(SSLFrontend):
    """``enh_ssl``: a trained enhancement model, frozen, in front of ``ssl``.

    Args:
        enh_config: the enhancement model's ``config.yaml``, as ``enh_train`` writes it.
        enh_model: its checkpoint (``*.pth``).
        ssl, cache_gb, layer, fs: see :class:`SSLFrontend`. The enhancement model hears 16 kHz.

    Raises:
        InputError: no such model (see :func:`~posinv.espnet.load.load_enhancement_model`).
    """

    def __init__(
        self,
        ssl: str,
        enh_config: str,
        enh_model: str,
        cache_gb: float = 0.0,
        layer: int | None = None,
        fs: int | str = SAMPLING_RATE,
    ) -> None:
        super().__init__(ssl, cache_gb, layer, fs)
        with torch.random.fork_rng(devices=[]):
            self.separate = load_enhancement_model(enh_config, enh_model)
        self._enh_options = Path(enh_config).read_text(encoding="utf-8")

    def digest(self) -> str:
        """Return a hexadecimal digest of all that determines the layers, except the audio."""
        return _digest(f"{super().digest()} {self._enh_options}", self.separate.enh_model)

    def encode(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layers of the enhanced waveforms as :meth:`SSLFrontend.encode` does.

        Utterances are enhanced one at a time, as ``enh_inference`` does: in many of ESPnet's
        separators, padding changes the output of the utterance before it.

        Raises:
            InputError: the waveforms need a gradient, and none goes through the enhancement model.
        """
        self.separate.enh_model.to(waves.device)
        self.separate.device = waves.device
        enhance = self._enhance_with_gradient if _needs_gradient(waves) else self._enhance
        enhanced = [
            enhance(wave[None, :length])[0, :length]
            for wave, length in zip(waves, lengths.tolist(), strict=True)
        ]
        return super().encode(torch.nn.utils.rnn.pad_sequence(enhanced, batch_first=True), lengths)

    def _enhance(self, wave: torch.Tensor) -> torch.Tensor:
        [enhanced] = self.separate(wave, fs=SAMPLING_RATE)
        return torch.from_numpy(enhanced).to(wave)

    def _enhance_with_gradient(self, wave: torch.Tensor) -> torch.Tensor:
        """Compute what ESPnet's ``SeparateSpeech`` does, which cuts the gradient."""
        model = self.separate.enh_model
        if isinstance(model, ESPnetDiffusionModel) or model.always_forward_in_48k:
            raise InputError(
                "front end enh_ssl: no gradient goes through an enhancement model by diffusion or "
                "with always_forward_in_48k: freeze what is in front of it, or take another model"
            )
        lengths = torch.tensor([wave.size(1)], device=wave.device)
        normalized = model.normalize_variance or model.normalize_variance_per_ch
        scale = wave.std(dim=1, keepdim=True) if normalized else 1.0
        # cuDNN's RNNs have no gradient in eval mode.
        with torch.backends.cudnn.flags(enabled=False):
            [enhanced], *_ = model.forward_enhance(
                wave / scale,
                lengths,
                {},
                fs=SAMPLING_RATE if self.separate.sfi_processing else None,
            )
        return enhanced * scale


def _digest(text: str, model: torch.nn.Module) -> str:
    """Return a digest of a text and of a model's parameters and buffers."""
    digest = blake2b(text.encode(), digest_size=16)
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _needs_gradient(waves: torch.Tensor) -> bool:
    return waves.requires_grad and torch.is_grad_enabled()


def _ratio(fs: int | str) -> Fraction:
    """Return a sampling rate over 16 kHz, if the resampling filters are of less than 10 MB."""
    try:
        rate = humanfriendly.parse_size(str(fs))
    except humanfriendly.InvalidSize:
        rate = 0
    ratio = Fraction(rate, SAMPLING_RATE)
    if rate < 1000 or ratio.numerator * ratio.denominator > 1_000_000:
        raise InputError(
            f"frontend_conf: fs: {fs}: no sampling rate that can be resampled to {SAMPLING_RATE} "
            "Hz here, such as 8k, 22050, 44100 or 48k: resample the audio before"
        )
    return ratio
