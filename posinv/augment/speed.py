"""Speed perturbation of a batch of waveforms."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
import torchaudio

from posinv.augment.draws import random_state
from posinv.errors import InputError
from posinv.lengths import index_tensor, zero_beyond


class SpeedPerturb:
    """Play each utterance at a speed drawn from ``factors``; duration and pitch both change.

    Args:
        factors: speeds, each in [0.5, 2]; 1.1 is faster and shorter. Rounded to hundredths.

    Raises:
        InputError: no factors, or one outside the range.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        if not factors or not all(0.5 <= factor <= 2 for factor in factors):
            raise InputError(f"speed factors must be one or more numbers in [0.5, 2]: {factors}")
        self.factors = [Fraction(round(factor * 100), 100) for factor in factors]

    def __call__(
        self, waves: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturb ``waves (B, T)`` of ``lengths (B,)`` samples.

        Returns:
            Waveforms ``(B, T')``, zero beyond their lengths, and lengths ``(B,)``:
            ``ceil(length / factor)``.
        """
        drawn = [random_state(key, "speed").choice(self.factors) for key in keys]
        old_lengths = lengths.tolist()
        new_lengths = [
            math.ceil(length / factor) for length, factor in zip(old_lengths, drawn, strict=True)
        ]
        out = waves.new_zeros(len(drawn), max(new_lengths, default=0))
        waves = zero_beyond(waves, lengths)
        for factor in set(drawn):
            rows = [b for b, other in enumerate(drawn) if other == factor]
            longest = max(old_lengths[b] for b in rows)
            chosen = waves[:, :longest].index_select(0, index_tensor(rows, waves.device))
            for b, wave in zip(rows, resample(chosen, factor), strict=True):
                wave = wave[: new_lengths[b]]
                out[b, : wave.numel()] = wave
        return out, lengths.new_tensor(new_lengths)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # for all later calls, whatever mode the first is in
def _resampler(ratio: Fraction, device: torch.device) -> torch.nn.Module:
    filters = torchaudio.transforms.Resample(
        ratio.numerator, ratio.denominator, dtype=torch.float64
    )
    return filters.to(device, non_blocking=True)


def resample(waves: torch.Tensor, ratio: Fraction) -> torch.Tensor:
    """Resample ``(B, T)`` to ``(B, ceil(T / ratio))``, float64.

    The convolution is in float64: a GPU would compute float32 as TF32, and autocast as bfloat16,
    which leaves noise at -50 dB. The filters are cached.
    """
    return _resampler(ratio, waves.device)(waves.double())
