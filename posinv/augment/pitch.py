"""Pitch shift of a batch of waveforms."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import count

import torch
import torch.nn.functional as F
import torchaudio

from posinv.augment.draws import random_state
from posinv.augment.speed import resample
from posinv.errors import InputError
from posinv.lengths import index_tensor, zero_beyond


class PitchShift:
    """Shift each utterance's pitch by a number of semitones drawn for it; its length stays.

    A phase vocoder changes the duration, and resampling changes it back. The bins around a spectral
    peak keep their phases relative to the peak's (identity phase locking: Laroche and Dolson,
    "Improved phase vocoder time-scale modification of audio", 1999). Without that, speech loses 3
    to 4 dB and sounds reverberant. The shift is exact to half a cent.

    Args:
        semitones: shifts, each in [-12, 12]; 0 leaves the utterance as it is.
        phase_locking: False for a phase vocoder without it, that of torchaudio's ``pitch_shift``
            (windows of 512 samples), with which LASER's authors trained.

    Raises:
        InputError: no shifts, or one outside the range.
    """

    def __init__(self, semitones: Sequence[float], phase_locking: bool = True) -> None:
        if not semitones or not all(-12 <= shift <= 12 for shift in semitones):
            raise InputError(f"semitones must be one or more numbers in [-12, 12]: {semitones}")
        self.ratios = [_frequency_ratio(shift) for shift in semitones]
        self.phase_locking = phase_locking

    def __call__(
        self, waves: torch.Tensor, lengths: torch.Tensor, keys: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift ``waves (B, T)`` of ``lengths (B,)`` samples.

        Returns:
            Waveforms ``(B, T)``, zero beyond their lengths, and the lengths.
        """
        drawn = [random_state(key, "pitch").choice(self.ratios) for key in keys]
        out = zero_beyond(waves, lengths)
        for ratio in set(drawn) - {1}:
            chosen_rows = [b for b, r in enumerate(drawn) if r == ratio]
            if not self.phase_locking:
                for b in chosen_rows:
                    out[b, : lengths[b]] = _shift_as_torchaudio(out[b, : lengths[b]], ratio)
                continue
            rows = index_tensor(chosen_rows, out.device)
            # Windows at the edges spread the signal into these zeros in front and behind.
            chosen = F.pad(out.index_select(0, rows).double(), (_WINDOW, _WINDOW))
            shifted = resample(_stretch(chosen, ratio), ratio)[:, _WINDOW:]
            out = out.index_copy(0, rows, shifted[:, : out.size(1)].to(out.dtype))
        return zero_beyond(out, lengths), lengths


_WINDOW, _HOP = 1024, 256  # samples


def _shift_as_torchaudio(wave: torch.Tensor, ratio: Fraction) -> torch.Tensor:
    # torchaudio.functional.pitch_shift (T,) -> (T,), but for the resampling: that of torchaudio
    # takes 1 GB of filters for two semitones, since it does not round the ratio of the frequencies.
    window, hop = torch.hann_window(512, device=wave.device), 128
    if wave.numel() <= 256:
        raise InputError(
            f"pitch shift without phase locking: an utterance of {wave.numel()} samples, of more "
            "than 256 that its window needs; leave it out"
        )
    spectrum = torch.stft(wave, 512, hop, window=window, return_complex=True)
    advance = torch.linspace(0, math.pi * hop, 257, device=wave.device)[:, None]
    stretched = torchaudio.functional.phase_vocoder(spectrum, float(1 / ratio), advance)
    length = round(wave.numel() * ratio)
    stretched = torch.istft(stretched, 512, hop, window=window, length=length)
    shifted = resample(stretched[None], ratio)[0, : wave.numel()].to(wave.dtype)
    return F.pad(shifted, (0, wave.numel() - shifted.numel()))


def _frequency_ratio(semitones: float) -> Fraction:
    # The simplest fraction > 0 within half a cent: resampling by it takes the fewest filters.
    ratio = 2 ** (semitones / 12)
    candidates = (Fraction(ratio).limit_denominator(limit) for limit in count(1))
    return next(
        near
        for near in candidates
        if near > 0 and abs(1200 * math.log2(near) - 100 * semitones) < 0.5
    )


def _stretch(waves: torch.Tensor, ratio: Fraction) -> torch.Tensor:
    # (B, T) -> (B, more than T * ratio): sample j is from the input's sample j / ratio.
    frames = 2 + math.ceil(waves.size(1) * ratio / _HOP)
    starts = torch.arange(frames, device=waves.device) * _HOP * ratio.denominator // ratio.numerator
    places = starts[:, None] + torch.arange(_WINDOW, device=waves.device)
    # The last frame may begin four hops past the end.
    waves = F.pad(waves, (_WINDOW // 2 + _HOP, _WINDOW // 2 + 4 * _HOP))
    window = torch.hann_window(_WINDOW, dtype=waves.dtype, device=waves.device)
    # Each frame, and the frame one output hop before it.
    now = torch.fft.rfft(waves[:, places + _HOP] * window)  # B, F, K
    before = torch.fft.rfft(waves[:, places] * window)
    # Output frame t is now[t] with rotated phases. From frame t - 1 to t, a peak's phase advances
    # as it does from before[t] to now[t]. The bins around the peak get the peak's rotation. Adding
    # 0 turns -0 into 0, so that silence has angle 0.
    turns = (now[:, :-1] * before[:, 1:].conj() + 0).angle()
    peaks = _nearest_peak(now.abs())
    rotations = [torch.zeros_like(turns[:, 0])]
    for turn, peak in zip(turns.unbind(1), peaks[:, 1:].unbind(1), strict=True):
        rotations.append((rotations[-1] + turn).gather(1, peak))
    rotated = now * torch.polar(
        torch.ones_like(peaks, dtype=waves.dtype), torch.stack(rotations, 1)
    )
    # Overlap and add; the squares of four windows sum to 1.5. Not torch.istft: it checks that the
    # sum is not 0, and waits for the GPU to do so.
    parts = torch.fft.irfft(rotated) * (window / 1.5)  # B, F, _WINDOW
    size = 1, (frames - 1) * _HOP + _WINDOW
    joined = F.fold(parts.transpose(1, 2), size, (1, _WINDOW), stride=(1, _HOP))
    return joined[:, 0, 0, _WINDOW // 2 :]


def _nearest_peak(magnitudes: torch.Tensor) -> torch.Tensor:
    # (..., K) -> for each bin, the nearest peak (a bin that is the greatest of the five around it),
    # or the first or last bin.
    bins = torch.arange(magnitudes.size(-1), device=magnitudes.device)
    peak = magnitudes == F.max_pool1d(magnitudes, 5, stride=1, padding=2)
    below = torch.where(peak, bins, 0).cummax(-1).values
    above = torch.where(peak, bins, len(bins) - 1).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(bins - below <= above - bins, below, above)
