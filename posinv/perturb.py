"""Views of a batch of waveforms; lengths travel along.

Every draw is a function of the utterance's key and of the seed torch was last given
(``torch.initial_seed()``) alone: not of the batch the utterance is in, nor of what was drawn
before. ESPnet seeds each epoch anew, so epochs draw differently, and a run that was killed and
resumed, or that is split over processes, draws what an unbroken one does.
"""

import math
import random
from collections.abc import Sequence
from fractions import Fraction

import torch
import torchaudio

from posinv.errors import InputError
from posinv.lengths import valid_mask


def random_state(key: str, purpose: str) -> random.Random:
    """Return the random state of one utterance for one purpose, under torch's current seed."""
    return random.Random(f"{torch.initial_seed()}/{purpose}/{key}")


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
        waves = waves * valid_mask(lengths, waves.size(1))
        for factor in set(drawn):
            rows = [b for b, other in enumerate(drawn) if other == factor]
            longest = max(old_lengths[b] for b in rows)
            sped = torchaudio.functional.resample(
                waves[rows, :longest], factor.numerator, factor.denominator
            )
            for b, wave in zip(rows, sped, strict=True):
                wave = wave[: new_lengths[b]]
                out[b, : wave.numel()] = wave
        return out, lengths.new_tensor(new_lengths)


class ZeroPad:
    """Put zeros before and after each utterance, a whole number of frame hops in front.

    The total is ``p`` of the utterance's length, ``p`` uniform in [``low``, ``high``]; how much
    of it goes in front is uniform too, rounded to whole hops (section 3.1 of arXiv 2601.21084's
    criterion fixes range and hop alignment).

    Args:
        low: smallest share of the length, in [0, high].
        high: largest share.
        hop: samples between two frames (320 for HuBERT).

    Raises:
        InputError: shares that are not ``0 <= low <= high``.
    """

    def __init__(self, low: float, high: float, hop: int) -> None:
        if not 0 <= low <= high:
            raise InputError(f"zero-padding range must be 0 <= low <= high: {low}, {high}")
        self.low, self.high, self.hop = low, high, hop

    def __call__(
        self, waves: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pad ``waves (B, T)`` of ``lengths (B,)`` samples.

        Returns:
            Waveforms ``(B, T')``; lengths ``(B,)``, padding included; hops in front ``(B,)``.
        """
        old_lengths = lengths.tolist()
        hops, new_lengths = [], []
        for key, length in zip(keys, old_lengths, strict=True):
            state = random_state(key, "zero_pad")
            total = round(state.uniform(self.low, self.high) * length)
            front = round(state.uniform(0, total) / self.hop)
            hops.append(front)
            new_lengths.append(length + max(total, front * self.hop))
        out = waves.new_zeros(len(hops), max(new_lengths, default=0))
        for b, (front, length) in enumerate(zip(hops, old_lengths, strict=True)):
            out[b, front * self.hop : front * self.hop + length] = waves[b, :length]
        return out, lengths.new_tensor(new_lengths), lengths.new_tensor(hops)
