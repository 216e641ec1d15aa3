"""Read and write single-channel audio: files, kaldiio archives and pipes."""

import io
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kaldiio
import numpy as np
import soundfile
import soxr

from posinv.data.files import atomic_file
from posinv.errors import InputError

SAMPLING_RATE = 16000  # Hz, of every model here
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".sph")


def read_audio(entry: str, sampling_rate: int, resample: bool = False) -> np.ndarray:
    """Read the audio that an entry of a ``wav.scp`` names.

    Args:
        entry: a file (WAV, FLAC, OGG or uncompressed NIST SPHERE; spaces are part of its
            name), a kaldiio archive position (``x.ark:123``), or a shell command whose output
            is audio (``sph2pipe -f wav x.sph |``).
        sampling_rate: the rate in Hz the samples are to have.
        resample: resample audio of another rate (soxr, high quality) instead of refusing it.

    Returns:
        float32 samples ``(T,)``, T >= 1, in [-1, 1]. Resampled audio may pass that range by
        the overshoot of the interpolation.

    Raises:
        InputError: nothing there, empty, not audio, more than one channel, out of range,
            a command that failed, or another sampling rate.
    """
    entry = entry.strip()
    x, rate = load_audio(entry)
    x = _one_channel(x, entry)
    if rate != sampling_rate:
        if not resample:
            raise InputError(
                f"{entry}: sampled at {rate} Hz, not {sampling_rate} Hz: ask for resampling "
                "(--resample) or convert the audio"
            )
        x = soxr.resample(x, rate, sampling_rate)
        if not x.size:
            raise InputError(f"{entry}: too short to resample: remove the utterance")
    return x


@dataclass(frozen=True)
class Recording:
    """Audio of one channel to cut pieces out of.

    Attributes:
        entry: of a ``wav.scp``.
        sampling_rate: in Hz.
        num_samples: its length.
        read: from a first sample to before a last one, float32 ``(T,)``; raises
            :class:`InputError` as :func:`read_audio`.
    """

    entry: str
    sampling_rate: int
    num_samples: int
    read: Callable[[int, int], np.ndarray]


def open_recording(entry: str) -> Recording:
    """Open what an entry of a ``wav.scp`` names; of a file, no more is read than is asked for.

    Raises:
        InputError: as :func:`load_audio`.
    """
    entry = entry.strip()
    if is_file(entry):
        _require_content(Path(entry))
        with _decoding(entry):
            info = soundfile.info(entry)

        def read(start: int, stop: int) -> np.ndarray:
            with _decoding(entry):
                x = soundfile.read(entry, stop - start, start, dtype="float32")[0]
            return _one_channel(x, entry)

        return Recording(entry, info.samplerate, info.frames, read)
    whole, rate = load_audio(entry)
    return Recording(entry, rate, len(whole), lambda a, b: _one_channel(whole[a:b], entry))


def is_file(entry: str) -> bool:
    """Whether an entry of a ``wav.scp`` names a file, not a command or an archive position."""
    archived = re.fullmatch(r".+:\d+", entry) and not Path(entry).exists()
    return not entry.endswith("|") and not archived


def load_audio(entry: str) -> tuple[np.ndarray, int]:
    """Read an entry of a ``wav.scp`` as it is: see :func:`read_audio`.

    Returns:
        float32 samples, ``(T,)`` or ``(T, C)``, and their rate in Hz.

    Raises:
        InputError: nothing there, an empty file, not audio, or a command that failed.
    """
    if entry.endswith("|"):
        return _decode(io.BytesIO(_run(entry)), f"output of '{entry}'")
    if not is_file(entry):
        return _read_archive(entry, Path(entry.rpartition(":")[0]))
    _require_content(Path(entry))
    return _decode(entry, entry)


def write_audio(path: Path | str, x: np.ndarray, sampling_rate: int) -> None:
    """Write samples ``(T,)`` in [-1, 1] as 16-bit FLAC or WAV, chosen by the suffix.

    The file appears whole or not at all.

    Raises:
        InputError: samples beyond [-1, 1] or not finite, or another suffix.
    """
    path = Path(path)
    if path.suffix not in (".flac", ".wav"):
        raise InputError(f"{path}: audio is written as .flac or .wav")
    x = np.asarray(x)
    if not x.size or not np.abs(x).max() <= 1:
        raise InputError(f"{path}: no samples, or samples beyond [-1, 1] that would clip: scale")
    pcm = np.clip(np.rint(x * 32768.0), -32768, 32767).astype(np.int16)
    with atomic_file(path) as temporary:
        soundfile.write(temporary, pcm, sampling_rate, "PCM_16")


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such audio file: correct its path or remove the utterance")
    if not path.stat().st_size:
        raise InputError(f"{path}: empty audio file: restore it or remove the utterance")


def _one_channel(x: np.ndarray, entry: str) -> np.ndarray:
    if x.ndim == 2 and x.shape[1] > 1:
        raise InputError(
            f"{entry}: {x.shape[1]} channels, one wanted: choose a channel with a pipe, "
            "such as 'sox FILE -t wav - remix 1 |'"
        )
    x = x.reshape(-1)
    if not x.size:
        raise InputError(f"{entry}: holds no samples: remove the utterance or restore the audio")
    if not np.abs(x).max() <= 1:  # also NaN
        raise InputError(f"{entry}: samples beyond [-1, 1] or not finite: scale or mend the audio")
    return x


def _decode(source: str | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    with _decoding(name):
        return soundfile.read(source, dtype="float32")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{name}: not audio that soundfile can read ({error.error_string.rstrip('.')}): "
            "convert it, or decode it with a pipe"
        ) from error


def _run(entry: str) -> bytes:
    command = entry.removesuffix("|")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise InputError(f"'{entry}': exit status {done.returncode} ({said[-1]}): mend the command")
    if not done.stdout:
        raise InputError(f"'{entry}': no output: the command must write audio to its stdout")
    return done.stdout


def _read_archive(entry: str, archive: Path) -> tuple[np.ndarray, int]:
    _require_content(archive)
    try:
        content = kaldiio.load_mat(entry)
    except Exception as error:  # kaldiio raises what its parser trips over
        raise InputError(
            f"{entry}: not a kaldiio entry ({type(error).__name__}): write the archive and its "
            "scp file again"
        ) from error
    if not isinstance(content, tuple):
        raise InputError(f"{entry}: a matrix without a sampling rate, not audio: store audio")
    rate, x = content
    scale = 1 / 32768 if x.dtype == np.int16 else 1
    return (x * scale).astype(np.float32), rate
