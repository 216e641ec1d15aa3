"""Zero-padding of a batch of waveforms by whole frame hops."""

from collections.abc import Sequence

import torch

from posinv.augment.draws import random_state
from posinv.errors import InputError


class ZeroPad:
    """Put zeros before and after each utterance, a whole number of frame hops in front.

    The total is ``p`` times the utterance's length, with ``p`` uniform in [``low``, ``high``]. The
    part of it in front is uniform too, rounded to whole hops. The range and the whole hops are
    those of arXiv 2601.21084, section 3.1.

    Args:
        low: least share of the length, in [0, high].
        high: greatest share.
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
