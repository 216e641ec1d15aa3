"""Perturbation of a batch of waveforms and their lengths.

Every draw depends on the utterance's id and torch's current random seed alone, see
:mod:`posinv.augment.draws`. With lengths on the CPU, nothing here waits for a GPU that has the
waveforms.
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
    """Speed, pitch, zero-padding and noise, in this order; each only if its option is given.

    Args:
        speed: factors of :class:`SpeedPerturb`.
        semitones: shifts of :class:`PitchShift`.
        phase_locking: an option of :class:`PitchShift`.
        pad: least and greatest share of :class:`ZeroPad`.
        noise_scp: noise recordings of :class:`AddNoise`, at 16 kHz.
        snrs: SNRs of :class:`AddNoise`, in dB.
        hop: samples between two frames, for zero-padding.

    Attributes:
        keeps_length: whether every utterance keeps its length: no speed but 1, and no padding.

    Raises:
        InputError: an option that its class refuses; ``pad`` is not two numbers; only one of
            ``noise_scp`` and ``snrs``.
    """

    def __init__(
        self,
        speed: Sequence[float] = (),
        semitones: Sequence[float] = (),
        pad: Sequence[float] | None = None,
        noise_scp: Path | str | None = None,
        snrs: Sequence[float] = (),
        hop: int = 320,
        phase_locking: bool = True,
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
            perturb = SpeedPerturb(speed)
            self.steps.append(perturb)
            self.keeps_length &= set(perturb.factors) == {1}
        if semitones:
            self.steps.append(PitchShift(semitones, phase_locking))
        if pad is not None:
            low, high = pad
            self.steps.append(ZeroPad(low, high, hop))
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
