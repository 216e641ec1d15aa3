"""Enhancement of a stream of 16 kHz audio: from Python, and as a pipe of raw PCM."""

import logging
import time
from dataclasses import dataclass
from io import RawIOBase

import numpy as np
import torch

from posinv.data.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.models.demucs import Demucs
from posinv.models.demucs_stream import DemucsStream

FULL_SCALE = 32768  # of 16-bit PCM
PIPE_BYTES = 1 << 16  # at most, of one read


class EnhancerStream:
    """Enhances one channel of 16 kHz audio while it arrives. :meth:`Enhancer.stream` returns one.

    ``stream(chunk)`` returns the samples that are ready, ``stream.flush()`` the rest. Together they
    are as many as went in. Their values do not depend on where the chunks are cut.

    Args:
        model: a causal DEMUCS.
        heard_level: the level that the signal is brought to for the model, and back after it.
        level: the signal's standard deviation, above 0, for full scale 1. None: the running level
            (:class:`~posinv.models.demucs_stream.RunningLevel`).
        dry: share of the input in the output, 0 to 1.
        name: of the model, for messages.

    Raises:
        InputError: the model is not causal, or the level not above 0.
    """

    def __init__(
        self,
        model: Demucs,
        heard_level: float,
        level: float | None = None,
        dry: float = 0.0,
        name: str = "the model",
    ) -> None:
        self._stream = DemucsStream(model, level, heard_level=heard_level)
        self._device = model.half_sample_kernel.device
        self._dry = dry
        self._name = name
        self._heard = np.zeros(0, dtype=np.float32)  # input whose output is to come

    @property
    def latency(self) -> int:
        """Samples that must follow a sample, at most, before its output is given."""
        return self._stream.latency

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        """Take a chunk; return the samples that are ready.

        Args:
            chunk: floating-point samples ``(t,)``, t >= 0.

        Returns:
            float32 samples ``(t',)``. They may pass [-1, 1].

        Raises:
            InputError: another shape or type, samples that are not finite, a model that gives such,
                or the stream has ended.
        """
        chunk = np.asarray(chunk)
        if chunk.ndim != 1 or not np.issubdtype(chunk.dtype, np.floating):
            raise InputError(
                "chunk of a stream: must be floating-point samples (t,) of one channel, got "
                f"{chunk.dtype} of shape {chunk.shape}"
            )
        if not np.isfinite(chunk).all():
            raise InputError("chunk of a stream: samples that are not finite (NaN or infinite)")
        wave = chunk.astype(np.float32)
        enhanced = self._stream(torch.from_numpy(wave)[None].to(self._device))
        if self._dry:
            self._heard = np.concatenate([self._heard, wave])
        return self._finish(enhanced)

    def flush(self) -> np.ndarray:
        """End the stream; return the samples that are left, ``(t,)``."""
        return self._finish(self._stream.flush())

    def _finish(self, enhanced: torch.Tensor) -> np.ndarray:
        out = enhanced[0].cpu().numpy()
        if not np.isfinite(out).all():
            raise InputError(f"{self._name}: the model gives samples that are not finite")
        if self._dry:
            heard, self._heard = np.split(self._heard, [len(out)])
            out = self._dry * heard + (1 - self._dry) * out
        return out


@dataclass
class Piped:
    """What :func:`pipe` did.

    Attributes:
        samples: samples that went in.
        busy: seconds of computing; waiting for the input does not count.
    """

    samples: int = 0
    busy: float = 0.0

    @property
    def real_time_factor(self) -> float:
        """Seconds of computing for a second of audio."""
        return self.busy * SAMPLING_RATE / self.samples


def pipe(stream: EnhancerStream, source: RawIOBase, sink: RawIOBase) -> Piped:
    """Enhance raw PCM (16 bits, signed, little-endian, 16 kHz, one channel) as it arrives.

    Args:
        stream: a new stream.
        source: where to read; an interrupt (Ctrl-C) while it waits ends it.
        sink: where to write.

    Raises:
        InputError: no samples, half a sample at the end, or a WAV file in place of raw samples;
            the sink was closed.
    """
    done = Piped()
    clipped = 0
    half = b""

    def enhance(samples: np.ndarray | None) -> None:
        nonlocal clipped
        started = time.perf_counter()
        enhanced = stream.flush() if samples is None else stream(samples)
        pcm = np.rint(enhanced * FULL_SCALE)
        clipped += int(np.count_nonzero((pcm < -FULL_SCALE) | (pcm > FULL_SCALE - 1)))
        data = pcm.clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2").tobytes()
        done.busy += time.perf_counter() - started
        _write(sink, data)

    while data := _read(source):
        if not done.samples and data.startswith(b"RIFF"):
            raise InputError(
                "standard input: a WAV file, but raw samples are needed: give the file by its name "
                "without --stream, or convert it (ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -)"
            )
        data = half + data
        whole = len(data) // 2 * 2
        half = data[whole:]
        samples = np.frombuffer(data[:whole], dtype="<i2").astype(np.float32) / FULL_SCALE
        done.samples += len(samples)
        enhance(samples)
    if not done.samples:
        raise InputError("standard input: holds no samples: pipe raw 16-bit PCM into it")
    enhance(None)
    if clipped:
        logging.warning("%d samples passed full scale and were clipped", clipped)
    if half:
        raise InputError(
            "standard input: ends with half a sample: it must be 16-bit PCM, two bytes a sample"
        )
    return done


def _read(source: RawIOBase) -> bytes | None:
    """Return what is there, as soon as there is something."""
    try:
        return source.read(PIPE_BYTES)
    except KeyboardInterrupt:
        logging.info("interrupted: this ends the stream")
        return None


def _write(sink: RawIOBase, data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[sink.write(left) or 0 :]
    except BrokenPipeError as error:
        raise InputError("standard output: its reader has closed it") from error
