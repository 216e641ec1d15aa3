"""Views of a batch of waveforms; lengths travel along.

Every draw is a function of the utterance's key and of the seed torch was last given
(``torch.initial_seed()``) alone: not of the batch the utterance is in, nor of what was drawn
before. ESPnet seeds each epoch anew, so epochs draw differently, and a run that was killed and
resumed, or that is split over processes, draws what an unbroken one does.

With lengths on the CPU, nothing here waits for a GPU that the waveforms are on.
"""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio

from posinv.audio import read_audio
from posinv.corpora.noise import FADE_SECONDS, seamless
from posinv.datadir import read_table
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
        waves = waves * valid_mask(lengths, waves.size(1), waves.device)
        for factor in set(drawn):
            rows = [b for b, other in enumerate(drawn) if other == factor]
            longest = max(old_lengths[b] for b in rows)
            chosen = waves[:, :longest].index_select(0, _indices(rows, waves.device))
            for b, wave in zip(rows, _resample(chosen, factor), strict=True):
                wave = wave[: new_lengths[b]]
                out[b, : wave.numel()] = wave
        return out, lengths.new_tensor(new_lengths)


class PitchShift:
    """Shift each utterance's pitch by a number of semitones drawn for it; its length stays.

    A phase vocoder changes the duration, resampling changes it back. The bins around a spectral
    peak keep their phases relative to it (identity phase locking: Laroche and Dolson, "Improved
    phase vocoder time-scale modification of audio", 1999), without which speech loses 3 to 4 dB
    and sounds reverberant. The shift is met to half a cent.

    Args:
        semitones: shifts, each in [-12, 12]; 0 leaves the utterance as it is.

    Raises:
        InputError: no shifts, or one outside the range.
    """

    def __init__(self, semitones: Sequence[float]) -> None:
        if not semitones or not all(-12 <= shift <= 12 for shift in semitones):
            raise InputError(f"semitones must be one or more numbers in [-12, 12]: {semitones}")
        self.ratios = [_frequency_ratio(shift) for shift in semitones]

    def __call__(
        self, waves: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift ``waves (B, T)`` of ``lengths (B,)`` samples.

        Returns:
            Waveforms ``(B, T)``, zero beyond their lengths, and the lengths.
        """
        drawn = [random_state(key, "pitch").choice(self.ratios) for key in keys]
        mask = valid_mask(lengths, waves.size(1), waves.device)
        out = waves * mask
        for ratio in set(drawn) - {1}:
            rows = [b for b, other in enumerate(drawn) if other == ratio]
            rows = _indices(rows, out.device)
            # The zeros in front and behind hold what the windows at the edges spread.
            chosen = F.pad(out.index_select(0, rows).double(), (_WINDOW, _WINDOW))
            shifted = _resample(_stretch(chosen, ratio), ratio)[:, _WINDOW:]
            out = out.index_copy(0, rows, shifted[:, : out.size(1)].to(out.dtype))
        return out * mask, lengths


_WINDOW, _HOP = 1024, 256  # samples


@lru_cache(maxsize=64)
def _resampler(ratio: Fraction, device: torch.device) -> torch.nn.Module:
    filters = torchaudio.transforms.Resample(
        ratio.numerator, ratio.denominator, dtype=torch.float64
    )
    return filters.to(device, non_blocking=True)


def _resample(waves: torch.Tensor, ratio: Fraction) -> torch.Tensor:
    # (B, T) -> (B, ceil(T / ratio)), the filters kept from call to call. In float64: a GPU's
    # convolution takes float32 as TF32, autocast as bfloat16, which leaves noise at -50 dB.
    return _resampler(ratio, waves.device)(waves.double())


def _indices(values: Sequence, device: torch.device) -> torch.Tensor:
    # torch.tensor(values, device=...) and indexing by a list wait for the GPU.
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def _frequency_ratio(semitones: float) -> Fraction:
    # The first within half a cent: the fewer filters to resample with, the quicker.
    ratio = 2 ** (semitones / 12)
    candidates = (Fraction(ratio).limit_denominator(limit) for limit in count(1))
    return next(
        near
        for near in candidates
        if near > 0 and abs(1200 * math.log2(near) - 100 * semitones) < 0.5  # 1/2 is first put at 0
    )


def _stretch(waves: torch.Tensor, ratio: Fraction) -> torch.Tensor:
    # (B, T) -> (B, more than T * ratio), sample j the input's j / ratio.
    frames = 2 + math.ceil(waves.size(1) * ratio / _HOP)
    starts = torch.arange(frames, device=waves.device) * _HOP * ratio.denominator // ratio.numerator
    places = starts[:, None] + torch.arange(_WINDOW, device=waves.device)
    # The last frame may be four hops past the end.
    waves = F.pad(waves, (_WINDOW // 2 + _HOP, _WINDOW // 2 + 4 * _HOP))
    window = torch.hann_window(_WINDOW, dtype=waves.dtype, device=waves.device)
    # Each frame, and what is there one output hop before it.
    now = torch.fft.rfft(waves[:, places + _HOP] * window)  # B, F, K
    before = torch.fft.rfft(waves[:, places] * window)
    # Output frame t is now[t] rotated. A peak's phase goes on from frame t - 1 by as much as it
    # moves from before[t] to now[t]; the bins around are rotated as it is. + 0 takes the sign off
    # zeros, so that silence has angle 0.
    turns = (now[:, :-1] * before[:, 1:].conj() + 0).angle()
    peaks = _nearest_peak(now.abs())
    rotations = [torch.zeros_like(turns[:, 0])]
    for turn, peak in zip(turns.unbind(1), peaks[:, 1:].unbind(1), strict=True):
        rotations.append((rotations[-1] + turn).gather(1, peak))
    rotated = now * torch.polar(
        torch.ones_like(peaks, dtype=waves.dtype), torch.stack(rotations, 1)
    )
    # Overlapped and added; the squares of four windows sum to 1.5. torch.istft looks whether they
    # vanish, and waits for the GPU to tell.
    parts = torch.fft.irfft(rotated) * (window / 1.5)  # B, F, _WINDOW
    size = 1, (frames - 1) * _HOP + _WINDOW
    joined = F.fold(parts.transpose(1, 2), size, (1, _WINDOW), stride=(1, _HOP))
    return joined[:, 0, 0, _WINDOW // 2 :]


def _nearest_peak(magnitudes: torch.Tensor) -> torch.Tensor:
    # (..., K) -> the nearest bin, for each, that is the greatest of five; or the first or last.
    bins = torch.arange(magnitudes.size(-1), device=magnitudes.device)
    peak = magnitudes == F.max_pool1d(magnitudes, 5, stride=1, padding=2)
    below = torch.where(peak, bins, 0).cummax(-1).values
    above = torch.where(peak, bins, len(bins) - 1).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(bins - below <= above - bins, below, above)


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


class AddNoise:
    """Add recorded noise to each utterance, at an SNR drawn for it.

    The recording, where in it to start and the SNR are drawn. A recording is played in a loop, its
    end cross-faded into its start. The SNR is that of the utterance's power against the noise's
    over the same samples. Sums may pass [-1, 1].

    The recordings are read at the first call, stay in memory and follow the input's device.

    Args:
        noise_scp: the ``wav.scp`` that lists the recordings.
        snrs: in dB.
        sampling_rate: of the recordings and of the utterances, in Hz.

    Raises:
        InputError: no SNRs, or one that isn't finite; at the first call, a recording that can't
            be read (as :func:`posinv.audio.read_audio`) or that is silent.
    """

    def __init__(
        self, noise_scp: Path | str, snrs: Sequence[float], sampling_rate: int = 16000
    ) -> None:
        if not snrs or not all(map(math.isfinite, snrs)):
            raise InputError(f"snrs must be one or more finite numbers, in dB: {snrs}")
        self.noise_scp, self.snrs, self.sampling_rate = noise_scp, snrs, sampling_rate
        self._loops: list[tuple[int, int]] = []  # where each begins in the noise, and its length
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
        begin, size, offset = _indices([begins, sizes, offsets], waves.device)[..., None]
        place = begin + (offset + torch.arange(waves.size(1), device=waves.device)) % size  # B, T
        mask = valid_mask(lengths, waves.size(1), waves.device)
        speech, noise = waves * mask, self._noise[place] * mask
        energy = noise.square().sum(dim=1)
        ratios = torch.tensor(ratios).to(energy, non_blocking=True)
        wanted = speech.square().sum(dim=1) / ratios
        gain = torch.where(energy > 0, wanted / energy, 0).sqrt()
        return speech + (gain[:, None] * noise).to(waves.dtype), lengths

    def _read(self) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        recordings, loops = [], []
        for name, entry in read_table(self.noise_scp).items():
            try:
                x = read_audio(entry, self.sampling_rate)
            except InputError as error:
                raise InputError(f"{self.noise_scp}: noise {name}: {error}") from error
            if not x.any():
                raise InputError(f"{self.noise_scp}: noise {name}: {entry}: silent: leave it out")
            x = seamless(x, round(FADE_SECONDS * self.sampling_rate))
            loops.append((sum(map(len, recordings)), len(x)))
            recordings.append(torch.from_numpy(x))
        return torch.cat(recordings), loops


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
