"""Read and write single-channel audio: files, kaldiio archives and pipes."""

import io
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kaldiio
import numpy as np
import soundfile
import soxr

from posinv.data.files import write_atomic
from posinv.errors import InputError

SAMPLING_RATE = 16000  # Hz, of every model here
RATES = range(1000, 768001)  # Hz, of recordings; other rates are damaged headers
MAX_SAMPLES = 1 << 31  # read at once; 37 hours at 16 kHz
UNKNOWN_LENGTH = 1 << 62  # samples, of a header that says none
SAMPLES_A_BYTE = 8192  # more than any codec makes of a byte; of FLAC's silence, 5461
AUDIO_SUFFIXES = frozenset(
    {f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"}
    | {".sph", ".aif", ".aifc", ".oga", ".opus", ".mp2", ".snd"}
)
UNREADABLE_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr", ".ra"})


def read_audio(
    entry: str, sampling_rate: int, resample: bool = False, channel: int | None = None
) -> np.ndarray:
    """Read the audio that an entry of a ``wav.scp`` names.

    Args:
        entry: a file (WAV, FLAC, OGG or uncompressed NIST SPHERE; spaces are part of its
            name), a kaldiio archive position (``x.ark:123``), or a shell command whose output
            is audio (``sph2pipe -f wav x.sph |``).
        sampling_rate: the rate in Hz the samples are to have.
        resample: resample audio of another rate (soxr, high quality) instead of refusing it.
        channel: as :meth:`Recording.read`.

    Returns:
        float32 samples ``(T,)``, T >= 1, in [-1, 1]. Resampled audio may pass that range by
        the overshoot of the interpolation.

    Raises:
        InputError: nothing there, empty, not audio, more than one channel, out of range,
            a command that failed, or another sampling rate.
    """
    recording = open_recording(entry.strip())
    x = recording.read(channel=channel)
    if recording.sampling_rate != sampling_rate:
        if not resample:
            raise InputError(
                f"{recording.name}: sampled at {recording.sampling_rate} Hz, not {sampling_rate} "
                "Hz: ask for resampling (--resample) or convert the audio"
            )
        x = soxr.resample(x, recording.sampling_rate, sampling_rate)
        if not x.size:
            raise InputError(f"{recording.name}: too short to resample: remove the utterance")
    return x


@dataclass(frozen=True)
class Recording:
    """Audio to be read in parts. A file stays on disk: only what is asked for is read.

    Attributes:
        name: the entry of a ``wav.scp``, for messages.
        sampling_rate: in Hz.
        channels: how many, C.
        num_samples: its length, T, as the header says.
        format: soundfile's name of the file's format.
        subtype: soundfile's name of the samples' encoding.
        samples: floating-point ``(T, C)`` of what isn't a file; None for a file.
    """

    name: str
    sampling_rate: int
    channels: int
    num_samples: int
    format: str
    subtype: str
    samples: np.ndarray | None

    @classmethod
    def of_array(cls, samples: np.ndarray, sampling_rate: int, name: str) -> "Recording":
        """Wrap samples ``(T,)`` or ``(T, C)``, to be written as 16-bit WAV."""
        samples = samples.reshape(len(samples), -1)
        return cls(name, sampling_rate, samples.shape[1], len(samples), "WAV", "PCM_16", samples)

    def read(
        self, start: int = 0, stop: int | None = None, channel: int | None = None
    ) -> np.ndarray:
        """Read from sample ``start`` to before ``stop``, or to the end: float32 ``(T,)``.

        Args:
            start: of the samples.
            stop: of the samples.
            channel: which of several, 1 for the first; 0 for the mean of all.

        Raises:
            InputError: more than one channel and none chosen, or no such channel; no samples,
                samples that are beyond [-1, 1] or not finite, or a damaged file.
        """
        if channel is None and self.channels > 1:
            raise InputError(
                f"{self.name}: {self.channels} channels, one wanted: import the data with "
                "--channel N, or choose one with a pipe, such as 'sox FILE -t wav - remix 1 |'"
            )
        if channel is not None and not 0 <= channel <= self.channels:
            raise InputError(
                f"{self.name}: no channel {channel}: it has {self.channels} (0 is their mean)"
            )
        if self.samples is None:
            frames = (self.num_samples if stop is None else stop) - start
            if frames * self.channels > MAX_SAMPLES:
                raise InputError(
                    f"{self.name}: {frames} samples at once, more than {MAX_SAMPLES}: cut it into "
                    "utterances (segments)"
                )
            with _decoding(self.name):
                x = soundfile.read(self.name, frames, start, dtype="float32", always_2d=True)[0]
            if len(x) < frames:
                raise InputError(
                    f"{self.name}: cut short: its header says {self.num_samples} samples, only "
                    f"{start + len(x)} are there: restore the file, or write it again"
                )
        else:
            x = self.samples[start:stop].astype(np.float32)
        x = x.mean(1) if channel == 0 else x[:, (channel or 1) - 1]
        if not x.size:
            raise InputError(
                f"{self.name}: holds no samples: remove the utterance or restore the audio"
            )
        if not np.abs(x).max() <= 1:  # also NaN
            raise InputError(
                f"{self.name}: samples beyond [-1, 1] or not finite: scale or mend the audio"
            )
        return x

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Read all from the beginning, as float32 ``(t, C)``, t <= ``size``.

        Raises:
            InputError: a damaged file.
        """
        if self.samples is not None:
            for start in range(0, len(self.samples), size):
                block = self.samples[start : start + size]
                yield np.ascontiguousarray(block, dtype=np.float32)
            return
        with _decoding(self.name), soundfile.SoundFile(self.name) as file:
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                yield block


def open_recording(entry: str) -> Recording:
    """Open what an entry of a ``wav.scp`` names: see :func:`read_audio`.

    Raises:
        InputError: nothing there, an empty file or one that is cut short, not audio, a header that
            can't be true, or a command that failed.
    """
    if "\0" in entry:
        raise InputError(f"{entry!r}: a null character: no file or command has one: remove it")
    if entry.endswith("|"):
        name = f"output of '{entry}'"
        with _decoding(name), soundfile.SoundFile(_run(entry)) as file:
            return _decoded(name, file)
    if not is_file(entry):
        return _read_archive(entry, Path(entry.rpartition(":")[0]))
    _require_content(Path(entry))
    _require_whole_wav(Path(entry))
    with _decoding(entry), soundfile.SoundFile(entry) as file:
        header = file.samplerate, file.channels, file.frames, file.format, file.subtype
        _require_whole(Path(entry), file)
        if file.frames >= UNKNOWN_LENGTH:
            return _decoded(entry, file)
    _check_rate(entry, header[0])
    size = Path(entry).stat().st_size
    if header[2] > SAMPLES_A_BYTE * size:
        raise InputError(
            f"{entry}: its header says {header[2]} samples, which {size} bytes can't hold: restore "
            "the file, or write it again"
        )
    return Recording(entry, *header, samples=None)


def _decoded(name: str, file: soundfile.SoundFile) -> Recording:
    """Decode a whole file whose header may not know its length, as of FLAC in a pipe."""
    _check_rate(name, file.samplerate)
    blocks, samples = [], 0
    while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
        blocks.append(block)
        samples += block.size
        if samples > MAX_SAMPLES:
            raise InputError(f"{name}: more than {MAX_SAMPLES} samples: cut it into recordings")
    x = np.concatenate([*blocks, np.empty((0, file.channels), np.float32)])
    return Recording.of_array(x, file.samplerate, name)


def _check_rate(name: str, rate: int) -> None:
    if rate not in RATES:
        raise InputError(
            f"{name}: sampled at {rate} Hz, its header says, which is not from {RATES[0]} to "
            f"{RATES[-1]}: restore the file, or write it again"
        )


def refuse_pipes(entries: Mapping[str, str], where: Path | str) -> None:
    """Refuse the commands among a list's entries, which reading the audio would run.

    For lists that others may have written. The message says what would be run.

    Args:
        entries: of a ``wav.scp``, by id.
        where: the list, for the message.

    Raises:
        InputError: an entry is a command.
    """
    pipes = {utt: entry for utt, entry in entries.items() if entry.rstrip().endswith("|")}
    if pipes:
        utt, command = next(iter(pipes.items()))
        raise InputError(
            f"{where}: {utt}: a command, which would be run: '{command}' ({len(pipes)} such): look "
            "at them, and give --allow_pipes (in a recipe: --allow_pipes true in "
            "--local_data_opts) if you trust the list"
        )


def is_file(entry: str) -> bool:
    """Whether an entry of a ``wav.scp`` names a file, not a command or an archive position."""
    archived = re.fullmatch(r".+:\d+", entry) and not Path(entry).exists()
    return not entry.endswith("|") and not archived


def write_audio(path: Path | str, x: np.ndarray, sampling_rate: int) -> None:
    """Write samples ``(T,)`` in [-1, 1] atomically, as 16-bit FLAC or WAV by the suffix.

    Raises:
        InputError: samples beyond [-1, 1] or not finite, or another suffix.
        OSError: no room.
    """
    path = Path(path)
    if path.suffix not in (".flac", ".wav"):
        raise InputError(f"{path}: audio is written as .flac or .wav")
    x = np.asarray(x)
    if not x.size or not np.abs(x).max() <= 1:
        raise InputError(f"{path}: no samples, or samples beyond [-1, 1] that would clip: scale")
    pcm = np.clip(np.rint(x * 32768.0), -32768, 32767).astype(np.int16)
    encoded = io.BytesIO()  # see OutputFile
    soundfile.write(encoded, pcm, sampling_rate, "PCM_16", format=path.suffix[1:])
    write_atomic(path, encoded.getvalue())


class OutputFile(io.FileIO):
    """A file for ``soundfile.SoundFile`` to write to, whose end tells of a full disk.

    libsndfile itself loses the end of a FLAC file then, and says nothing.

    Args:
        path: file to write.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or keep the error for :meth:`close`."""
        left = memoryview(data)
        try:
            while left and not self._error:
                left = left[super().write(left) :]
        except OSError as error:
            self._error = error
        return len(data)

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: not all of it could be written.
        """
        super().close()
        error, self._error = self._error, None
        if error:
            raise error


def _require_content(path: Path) -> None:
    try:
        found, why = path.is_file(), "no such audio file"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        found, why = False, str(error.strerror)
    if not found:
        raise InputError(f"{path}: {why}: correct its path or remove the utterance")
    if not path.stat().st_size:
        raise InputError(f"{path}: empty audio file: restore it or remove the utterance")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: may not be read: change its permissions (chmod)")


def _require_whole_wav(path: Path) -> None:
    # libsndfile reads what is there of a WAV file, whatever its header says.
    with path.open("rb") as file:
        if file.read(4) != b"RIFF" or not file.seek(8) or file.read(4) != b"WAVE":
            return
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                there = path.stat().st_size - file.tell()
                # Programs that write into a pipe don't know the size, and write the greatest.
                if there < size < 0x7FFFF000:
                    raise InputError(
                        f"{path}: cut short: its header says {size} bytes of audio, {there} are "
                        "there: restore the file, or write it again"
                    )
                return
            file.seek(size + size % 2, 1)


def _require_whole(path: Path, file: soundfile.SoundFile) -> None:
    """Refuse what libsndfile takes as it is, though the header says that there was more."""
    said, there = 0, file.frames
    if file.format == "NIST":
        with path.open("rb") as raw:
            header = raw.read(1024)
        said = int((re.search(rb"^sample_count -i (\d+)", header, re.M) or [0, 0])[1])
    elif file.format in ("AIFF", "AU", "W64", "RF64", "SVX"):
        log = re.findall(r"(\d+) \(should be (\d+)\)", file.extra_info)
        said, there = max(((int(a), int(b)) for a, b in log), default=(0, 0))
    if there < said < 0x7FFFF000:  # see _require_whole_wav
        raise InputError(
            f"{path}: cut short: its header says {said} samples or bytes, {there} are there: "
            "restore the file, or write it again"
        )


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    # TypeError: a headerless .raw; MemoryError: a header that says too much
    except (soundfile.LibsndfileError, TypeError, MemoryError) as error:
        why = getattr(error, "error_string", str(error)).rstrip(".")
        raise InputError(
            f"{name}: not audio that soundfile can read ({why}): convert it, or decode it with a "
            "pipe"
        ) from error


def _run(entry: str) -> io.BytesIO:
    command = entry.removesuffix("|")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise InputError(f"'{entry}': exit status {done.returncode} ({said[-1]}): mend the command")
    if not done.stdout:
        raise InputError(f"'{entry}': no output: the command must write audio to its stdout")
    return io.BytesIO(done.stdout)


def _read_archive(entry: str, archive: Path) -> Recording:
    _require_content(archive)
    if "|" in (str(archive).strip()[0], str(archive).strip()[-1]):
        raise InputError(f"{entry}: kaldiio would run it as a command: rename the archive")
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
    if x.dtype == np.int16:
        x = (x / 32768).astype(np.float32)
    return Recording.of_array(x, rate, entry)
