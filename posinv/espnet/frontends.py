"""ESPnet ASR front ends over frozen models: ``ssl``, and ``enh_ssl`` with enhancement before it.

Both return SUPERB's weighted sum of the SSL model's layers. Its weights are learned; they are the
front ends' only parameters.
"""

import hashlib
from typing import cast

import torch
from espnet2.asr.frontend.abs_frontend import AbsFrontend

from posinv.data.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.espnet.load import load_enhancement_model
from posinv.ssl.upstream import Frozen, SSLUpstream


class SSLFrontend(AbsFrontend):
    """``ssl``: a frozen SSL model's layers, summed with softmax weights (SUPERB, arXiv 2105.01051).

    The SSL model is not saved in the checkpoint, since the configuration names it.

    Args:
        ssl: the SSL model, a hub name or a folder (see :class:`~posinv.ssl.upstream.SSLUpstream`).
        cache_gb: size in GiB of a cache for the layers of training and validation utterances;
            0 for no cache. From the second epoch on, an utterance in the cache isn't encoded
            again. With a cache, utterances are encoded one at a time, so that their layers don't
            depend on the batch. It helps only where the audio is the same in every epoch.

    Raises:
        InputError: no such model, or a negative ``cache_gb``.
    """

    def __init__(self, ssl: str, cache_gb: float = 0.0) -> None:
        super().__init__()
        if cache_gb < 0:
            raise InputError(f"frontend_conf: cache_gb must be at least 0: {cache_gb}")
        upstream = SSLUpstream(ssl)
        self.upstream = Frozen(upstream)
        self.feature_size = upstream.output_size
        self.weights = torch.nn.Parameter(torch.zeros(upstream.num_layers))
        self._cache: dict[bytes, torch.Tensor] = {}
        self._cached = cache_gb > 0
        self._cache_room = cache_gb * 2**30

    def output_size(self) -> int:
        """Return the feature dimension."""
        return self.feature_size

    def forward(
        self, input: torch.Tensor, input_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the SSL model's layers.

        Args:
            input: waveforms ``(B, T)`` at 16 kHz.
            input_lengths: their lengths ``(B,)`` in samples.

        Returns:
            The features ``(B, F, D)``, zero past each utterance's frames, and the frame counts
            ``(B,)``.

        Raises:
            InputError: an utterance is shorter than one frame.
        """
        with torch.no_grad():
            encode = self._encode_cached if self._cached else self.encode
            hidden, frame_lengths = encode(input, input_lengths)
        weights = self.weights.softmax(dim=0)
        return torch.einsum("l,lbfd->bfd", weights, hidden), frame_lengths

    def encode(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all layers ``(L+1, B, F, D)`` and the frame counts ``(B,)``."""
        return cast(tuple[torch.Tensor, torch.Tensor], self.upstream(waves, lengths))

    def _encode_cached(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        utterances = [
            self._layers(wave[:length])
            for wave, length in zip(waves, lengths.tolist(), strict=True)
        ]
        frame_lengths = lengths.new_tensor([layers.size(1) for layers in utterances])
        hidden = waves.new_zeros(
            utterances[0].size(0), len(utterances), int(frame_lengths.max()), self.output_size()
        )
        for b, layers in enumerate(utterances):
            hidden[:, b, : layers.size(1)] = layers
        return hidden, frame_lengths

    def _layers(self, wave: torch.Tensor) -> torch.Tensor:
        """Return one utterance's layers ``(L+1, F, D)``, from the cache if it has them."""
        key = hashlib.blake2b(wave.cpu().numpy().tobytes(), digest_size=16).digest()
        layers = self._cache.get(key)
        if layers is None:
            layers = self.encode(wave[None], torch.tensor([wave.numel()], device=wave.device))[0]
            layers = layers[:, 0]
            size = layers.numel() * layers.element_size()
            if size <= self._cache_room:
                self._cache_room -= size
                self._cache[key] = layers
        return layers


class EnhSSLFrontend(SSLFrontend):
    """``enh_ssl``: a trained enhancement model, frozen, in front of ``ssl``.

    Args:
        enh_config: the enhancement model's ``config.yaml``, as ``enh_train`` writes it.
        enh_model: its checkpoint (``*.pth``).
        ssl, cache_gb: see :class:`SSLFrontend`.

    Raises:
        InputError: no such model (see :func:`~posinv.espnet.load.load_enhancement_model`).
    """

    def __init__(self, ssl: str, enh_config: str, enh_model: str, cache_gb: float = 0.0) -> None:
        super().__init__(ssl, cache_gb)
        self.separate = load_enhancement_model(enh_config, enh_model)

    def encode(
        self, waves: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layers ``(L+1, B, F, D)`` of the enhanced waveforms, and frame counts.

        Utterances are enhanced one at a time, as ``enh_inference`` does: in many of ESPnet's
        separators, padding changes the output of the utterance before it.
        """
        self.separate.enh_model.to(waves.device)
        self.separate.device = waves.device
        enhanced = torch.zeros_like(waves)
        for b, length in enumerate(lengths.tolist()):
            [wave] = self.separate(waves[b : b + 1, :length], fs=SAMPLING_RATE)
            enhanced[b, :length] = torch.from_numpy(wave[0, :length])
        return super().encode(enhanced, lengths)
