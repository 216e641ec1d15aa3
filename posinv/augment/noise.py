"""Synthetic noises, and excerpts of recorded ones."""

import math
from collections.abc import Callable

import numpy as np

FADE_SECONDS = 0.05  # length of the cross-fade from a looped recording's end to its start


def white(rng: np.random.Generator, num_samples: int, sampling_rate: int) -> np.ndarray:
    """White Gaussian noise, ``(num_samples,)``."""
    return rng.standard_normal(num_samples)


def pink(rng: np.random.Generator, num_samples: int, sampling_rate: int) -> np.ndarray:
    """Noise of power 1/f, -3 dB an octave above 20 Hz, ``(num_samples,)``."""
    return _coloured(rng, num_samples, sampling_rate, lambda f: f**-0.5)


def brown(rng: np.random.Generator, num_samples: int, sampling_rate: int) -> np.ndarray:
    """Noise of power 1/f², -6 dB an octave above 20 Hz, ``(num_samples,)``."""
    return _coloured(rng, num_samples, sampling_rate, lambda f: 1 / f)


def hum(rng: np.random.Generator, num_samples: int, sampling_rate: int) -> np.ndarray:
    """Mains hum, ``(num_samples,)``: drifting harmonics of 50 or 60 Hz over weak pink noise."""
    seconds = num_samples / sampling_rate
    knots = np.linspace(0, seconds, 2 + math.ceil(seconds))
    drift = np.interp(
        np.arange(num_samples) / sampling_rate, knots, rng.uniform(-0.3, 0.3, len(knots))
    )
    phase = 2 * np.pi * np.cumsum(rng.choice([50, 60]) + drift) / sampling_rate
    x = np.zeros(num_samples)
    for harmonic in range(1, 21):
        amplitude = rng.uniform(0.3, 1) / harmonic**0.7
        x += amplitude * np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
    return _unit(x) + 0.1 * _unit(pink(rng, num_samples, sampling_rate))


def modulated(rng: np.random.Generator, num_samples: int, sampling_rate: int) -> np.ndarray:
    """Noise 1.5 octaves wide whose level rises and falls 2-8 times a second, ``(num_samples,)``."""
    centre = 2 ** rng.uniform(math.log2(400), math.log2(0.2 * sampling_rate))
    carrier = _coloured(
        rng, num_samples, sampling_rate, lambda f: np.exp(-((np.log2(f / centre) / 0.75) ** 4))
    )
    rate, depth, start = rng.uniform(2, 8), rng.uniform(0.8, 1), rng.uniform(0, 2 * np.pi)
    time = np.arange(num_samples) / sampling_rate
    return carrier * (1 + depth * np.sin(2 * np.pi * rate * time + start))


def impulsive(rng: np.random.Generator, num_samples: int, sampling_rate: int) -> np.ndarray:
    """Decaying bursts at Poisson times, 6 a second, over a weak white floor, ``(num_samples,)``."""
    x = 0.02 * rng.standard_normal(num_samples)
    for _ in range(1 + rng.poisson(6 * num_samples / sampling_rate)):
        start = int(rng.integers(num_samples))
        decay = sampling_rate * 10 ** rng.uniform(-2.7, -1.7)  # 2-20 ms
        burst = rng.standard_normal(min(num_samples - start, math.ceil(5 * decay)))
        level = 10 ** (rng.normal(0, 5) / 20)
        x[start : start + len(burst)] += level * burst * np.exp(-np.arange(len(burst)) / decay)
    return x


NOISES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    noise.__name__: noise for noise in (white, pink, hum, brown, modulated, impulsive)
}


def _coloured(
    rng: np.random.Generator,
    num_samples: int,
    sampling_rate: int,
    gain: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    # White noise through gain(f) and a second-order high-pass at 20 Hz.
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    f = np.fft.rfftfreq(num_samples, 1 / sampling_rate)
    f[0] = f[1] if len(f) > 1 else 1.0
    spectrum *= gain(f) / np.sqrt(1 + (20 / f) ** 4)
    spectrum[0] = 0
    return np.fft.irfft(spectrum, num_samples)


def _unit(x: np.ndarray) -> np.ndarray:
    power = np.mean(x**2)
    return x / math.sqrt(power) if power > 0 else x


def seamless(x: np.ndarray, fade: int) -> np.ndarray:
    """Return ``x`` as a loop: its end is cross-faded into its start at equal power.

    The fade takes ``fade`` samples, fewer in a very short signal. The loop is that much shorter
    than ``x``.
    """
    fade = min(fade, len(x) // 4)
    loop = x[: len(x) - fade].copy()
    angle = np.linspace(0, np.pi / 2, fade)
    loop[:fade] = loop[:fade] * np.sin(angle) + x[len(x) - fade :] * np.cos(angle)
    return loop


def excerpt(
    x: np.ndarray, num_samples: int, rng: np.random.Generator, fade: int
) -> tuple[np.ndarray, int]:
    """Return a random part of ``x``, ``num_samples`` long, and the sample where it starts.

    A signal shorter than ``num_samples`` is looped (:func:`seamless`).
    """
    if len(x) >= num_samples:
        start = int(rng.integers(len(x) - num_samples + 1))
        return x[start : start + num_samples], start
    loop = seamless(x, fade)
    start = int(rng.integers(len(loop)))
    return loop[(start + np.arange(num_samples)) % len(loop)], start
