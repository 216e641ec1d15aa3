"""Views of a batch of waveforms; lengths travel along.

Every draw is a function of the utterance's key and of the seed torch was last given
(``torch.initial_seed()``) alone: not of the batch the utterance is in, nor of what was drawn
before. ESPnet seeds each epoch anew, so epochs draw differently, and a run that was killed and
resumed, or that is split over processes, draws what an unbroken one does.

With lengths on the CPU, nothing here waits for a GPU that the waveforms are on.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from posinv.augment.add_noise import AddNoise
from posinv.augment.pad import ZeroPad
from posinv.augment.pitch import PitchShift
from posinv.augment.speed import SpeedPerturb
from posinv.errors import InputError


class Perturbation:
    """Speed, pitch, zero-padding and noise, in this order, each left out if not asked for.

    Args:
        speed: factors of :class:`SpeedPerturb`.
        semitones: shifts of :class:`PitchShift`.
        pad: smallest and largest share of :class:`ZeroPad`.
        noise_scp: noise recordings of :class:`AddNoise`, at 16 kHz.
        snrs: SNRs of :class:`AddNoise`, in dB.
        hop: samples between two frames, for zero-padding.

    Attributes:
        keeps_length: whether every utterance keeps its length: no speed but 1, and no padding.

    Raises:
        InputError: as the four; ``pad`` is not two numbers; ``noise_scp`` without ``snrs``, or
            the reverse.
    """

    def __init__(
        self,
        speed: Sequence[float] = (),
        semitones: Sequence[float] = (),
        pad: Sequence[float] | None = None,
        noise_scp: Path | str | None = None,
        snrs: Sequence[float] = (),
        hop: int = 320,
    ) -> None:
        if pad is not None and len(pad) != 2:
            raise InputError(f"pad must be two numbers, low and high: {pad}")
        if bool(noise_scp) != bool(snrs):
            raise InputError(
                f"noise_scp and snrs go together: give both or neither: {noise_scp}, {snrs}"
            )
        self.steps: list[SpeedPerturb | PitchShift | ZeroPad | AddNoise] = []
        self.keeps_length = pad is None
        if speed:
            self.steps.append(SpeedPerturb(speed))
            self.keeps_length &= set(self.steps[0].factors) == {1}
        if semitones:
            self.steps.append(PitchShift(semitones))
        if pad is not None:
            self.steps.append(ZeroPad(*pad, hop))
        if noise_scp:
            self.steps.append(AddNoise(noise_scp, snrs))

    def __call__(
        self, waves: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Perturb ``waves (B, T)`` of ``lengths (B,)`` samples.

        Returns:
            Waveforms ``(B, T')`` and their lengths ``(B,)``.
        """
        for step in self.steps:
            waves, lengths = step(waves, lengths, keys)[:2]
        return waves, lengths
