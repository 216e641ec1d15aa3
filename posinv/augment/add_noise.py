"""Noise recordings added to a batch of waveforms."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from posinv.augment.draws import random_state
from posinv.augment.noise import FADE_SECONDS, seamless
from posinv.data.audio import read_audio
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.lengths import index_tensor, zero_beyond


class AddNoise:
    """Add recorded noise to each utterance, at an SNR drawn for it.

    Drawn are the recording, where in it the noise starts, and the SNR. A recording is played in a
    loop, its end cross-faded into its start. The SNR is the ratio of the powers of utterance and
    noise over the same samples. The sum may leave [-1, 1].

    The recordings are read at the first call, stay in memory and follow the input's device.

    Args:
        noise_scp: the ``wav.scp`` that lists the recordings.
        snrs: SNRs to draw from, in dB.
        sampling_rate: sampling rate of recordings and utterances, in Hz.

    Raises:
        InputError: no SNRs, or one that isn't finite; at the first call, a recording that can't
            be read (as :func:`posinv.data.audio.read_audio`) or that is silent.
    """

    def __init__(
        self, noise_scp: Path | str, snrs: Sequence[float], sampling_rate: int = 16000
    ) -> None:
        if not snrs or not all(map(math.isfinite, snrs)):
            raise InputError(f"snrs must be one or more finite numbers, in dB: {snrs}")
        self.noise_scp, self.snrs, self.sampling_rate = noise_scp, snrs, sampling_rate
        self._loops: list[tuple[int, int]] = []  # of each recording: its first sample, its length
        self._noise: torch.Tensor | None = None

    def __call__(
        self, waves: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add noise to ``waves (B, T)`` of ``lengths (B,)`` samples.

        Returns:
            Waveforms ``(B, T)``, zero beyond their lengths, and the lengths. Silent utterances
            stay silent.
        """
        if self._noise is None:
            self._noise, self._loops = self._read()
        self._noise = self._noise.to(waves.device)
        begins, sizes, offsets, ratios = [], [], [], []
        for key in keys:
            state = random_state(key, "noise")
            begin, size = state.choice(self._loops)
            begins.append(begin)
            sizes.append(size)
            offsets.append(state.randrange(size))
            ratios.append(10 ** (state.choice(self.snrs) / 10))
        begin, size, offset = index_tensor([begins, sizes, offsets], waves.device)[..., None]
        place = begin + (offset + torch.arange(waves.size(1), device=waves.device)) % size  # B, T
        speech, noise = (zero_beyond(x, lengths) for x in (waves, self._noise[place]))
        energy = noise.square().sum(dim=1)
        ratio = torch.tensor(ratios).to(energy, non_blocking=True)
        wanted = speech.square().sum(dim=1) / ratio
        gain = torch.where(energy > 0, wanted / energy, 0).sqrt()
        return speech + (gain[:, None] * noise).to(waves.dtype), lengths

    def _read(self) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        recordings: list[torch.Tensor] = []
        loops = []
        for name, entry in read_table(self.noise_scp).items():
            try:
                x = read_audio(entry, self.sampling_rate)
            except InputError as error:
                raise InputError(f"{self.noise_scp}: noise {name}: {error}") from error
            if not x.any():
                raise InputError(f"{self.noise_scp}: noise {name}: {entry}: silent: leave it out")
            x = seamless(x, round(FADE_SECONDS * self.sampling_rate))
            loops.append((sum(len(other) for other in recordings), len(x)))
            recordings.append(torch.from_numpy(x))
        return torch.cat(recordings), loops
