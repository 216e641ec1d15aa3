"""Enhancement of one's own audio: any length, sampling rate, number of channels and format.

An array and a file go through the same chain of blocks, whose memory doesn't grow with length::

    level -> 16 kHz -> segments -> model -> cross-fades -> sampling rate of the input -> level

Level: models are trained on speech of ordinary loudness, and some are not invariant to it (DEMUCS
adds a floor of 1e-3 to the standard deviation that it divides by). So the whole signal, all
channels together, is brought to a root mean square of 0.05 before the model and back after it:
scaling the input by a factor scales the output by it. Digital silence goes in as it is.

What is above 8 kHz in the input is not in the output: the models work at 16 kHz.
"""

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from os.path import realpath
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from posinv.data.audio import (
    AUDIO_SUFFIXES,
    SAMPLING_RATE,
    OutputFile,
    Recording,
    is_file,
    open_recording,
    refuse_pipes,
)
from posinv.data.directory import refuse_overlap
from posinv.data.files import atomic_file
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.inference.stream import EnhancerStream
from posinv.models.demucs import Demucs

LEVEL = 0.05
MIN_SAMPLES = 1600
MAX_CHANNELS = 64  # an array with more, and with fewer samples than channels, must be (C, T)
BLOCK = 1 << 16
FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")
BYTES = {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}  # of a sample; others: 1
MAX_WAV_BYTES = 2**32 - 4096  # sizes in WAV's header have 32 bits

Existing = Literal["refuse", "replace", "keep"]  # what to do with outputs that exist


class Enhancer:
    """A trained enhancement model, for arrays and files of any length and sampling rate.

    The model hears 16 kHz, one channel at a time, in segments whose outputs are cross-faded
    linearly where they overlap; audio of up to one segment goes in as one piece. The last
    segment is a whole one too: it begins early, for context. Pieces below 0.1 s are
    zero-padded to it for the model.

    Args:
        model: a training directory that ``enh_train`` left (``config.yaml`` and a checkpoint).
        checkpoint: the checkpoint's name in it.
        device: where to run.
        segment: seconds of a segment, at least 0.1.
        overlap: seconds that neighbouring segments share, 0 to half a segment.
        dry: share of the input in the output, 0 to 1, for a more natural sound; the rest is the
            model's output.

    Raises:
        InputError: an option out of range, or no such model
            (see :func:`~posinv.espnet.load.load_enhancement_model`).
    """

    def __init__(
        self,
        model: Path | str,
        checkpoint: str = "valid.loss.best.pth",
        device: str = "cpu",
        segment: float = 10.0,
        overlap: float = 1.0,
        dry: float = 0.0,
    ) -> None:
        if not MIN_SAMPLES / SAMPLING_RATE <= segment < math.inf:
            raise InputError(f"segment of {segment} s: must be at least 0.1 s")
        if not 0 <= overlap <= segment / 2:
            raise InputError(
                f"overlap of {overlap} s: must be from 0 to half a segment ({segment / 2} s)"
            )
        if not 0 <= dry <= 1:
            raise InputError(f"dry share of {dry}: must be from 0 to 1")
        self.dry = dry
        self.segment = round(segment * SAMPLING_RATE)
        self.overlap = math.floor(overlap * SAMPLING_RATE)
        self.model = Path(model)
        # Here, so that what doesn't need a model doesn't wait for ESPnet.
        import posinv.espnet  # noqa: F401
        from posinv.espnet.load import load_enhancement_model

        self.separate = load_enhancement_model(
            self.model / "config.yaml", self.model / checkpoint, device
        )

    def __call__(self, wave: np.ndarray, sampling_rate: int) -> np.ndarray:
        """Enhance an array.

        Args:
            wave: floating-point samples ``(T,)`` or ``(T, C)``, T >= 1; each channel is
                enhanced by itself.
            sampling_rate: its rate in Hz.

        Returns:
            float32 samples of the same shape and rate. They may pass [-1, 1].

        Raises:
            InputError: another shape (such as ``(C, T)`` of torchaudio), type or rate, no samples,
                samples that are not finite, or a model that gives such.
        """
        wave = np.asarray(wave)
        if wave.ndim not in (1, 2) or not wave.size or not np.issubdtype(wave.dtype, np.floating):
            raise InputError(
                "audio to enhance must be floating-point samples (T,) or (T, C), T and C at least "
                f"1: got {wave.dtype} of shape {wave.shape}"
            )
        if wave.ndim == 2 and wave.shape[1] > max(len(wave), MAX_CHANNELS):
            raise InputError(
                f"audio to enhance of shape {wave.shape}: channels come last, (T, C); transpose it"
            )
        if sampling_rate < 1:
            raise InputError(f"sampling rate of {sampling_rate} Hz: must be at least 1")
        audio = Recording.of_array(wave, sampling_rate, "audio to enhance")
        return np.concatenate(list(self._enhance(audio))).reshape(wave.shape)

    def enhance_file(
        self,
        source: Path | str,
        destination: Path | str,
        progress: Callable[[float], object] | None = None,
    ) -> float:
        """Enhance a file block by block; the result is written atomically.

        Its rate and channels are the source's. So are format and subtype where it has the same
        suffix; otherwise the suffix names the format, and the subtype is the source's if that
        is PCM or float and the format has it, 24 bits from more than that, or else the format's
        default. Tags are not carried over. Samples beyond full scale are clipped, with a
        logged warning, unless the subtype is float.

        Args:
            source: a file that soundfile reads, or another entry of a ``wav.scp`` (an archive
                position or a command), which is read whole and taken for 16-bit PCM.
            destination: file to write; its folder is made.
            progress: called with the seconds of audio done since the last call.

        Returns:
            Seconds of audio.

        Raises:
            InputError: no such audio, unreadable, empty or not finite; a format that can't be
                written; a model that gives samples that are not finite.
            OSError: no room for ``destination``.
        """
        destination = Path(destination)
        audio = open_recording(str(source))
        file_format, subtype = _encoding(audio, destination)
        samples = clipped = 0
        with (
            atomic_file(destination) as temporary,
            OutputFile(temporary) as output,
            soundfile.SoundFile(
                output, "w", audio.sampling_rate, audio.channels, subtype, format=file_format
            ) as file,
        ):
            for block in self._enhance(audio):
                if subtype not in FLOAT_SUBTYPES:
                    clipped += int(np.count_nonzero(np.abs(block) > 1))
                    block = block.clip(-1, 1)
                file.write(block)
                samples += len(block)
                if progress:
                    progress(len(block) / audio.sampling_rate)
        if clipped:
            logging.warning(
                "%s: %d samples passed full scale and were clipped: scale the input down, or "
                "write a float subtype",
                destination,
                clipped,
            )
        return samples / audio.sampling_rate

    def stream(self, level: float | None = None) -> EnhancerStream:
        """Return a stream for audio that arrives in chunks, one channel at 16 kHz.

        Only a causal DEMUCS can stream. The latency is 763 samples (47.7 ms) for the options of the
        released causal models, and memory does not grow with the length of the stream.

        A stream has no segments, and no level of the whole recording. For audio of up to one
        segment, ``level=wave.std()`` gives the output of ``enhancer(wave, 16000)``, within 1e-4 of
        its largest sample if the mean is below a tenth of the standard deviation. With the running
        level of the last 10 s, the default, the output differs as that level differs from the whole
        recording's.

        Args:
            level: the signal's standard deviation, above 0, for full scale 1; None: the running
                level.

        Raises:
            InputError: another model than a causal DEMUCS, or the level not above 0.
        """
        separator = self.separate.enh_model.separator
        if not (isinstance(separator, Demucs) and separator.causal):
            kind = "a DEMUCS that is not causal" if isinstance(separator, Demucs) else "another"
            raise InputError(
                f"{self.model}: only a causal DEMUCS can stream, and this is {kind}: enhance whole "
                "files with it"
            )
        return EnhancerStream(separator, LEVEL, level, self.dry, str(self.model))

    def _enhance(self, audio: Recording) -> Iterator[np.ndarray]:
        """Yield blocks ``(t, C)`` of the enhanced signal, as many samples in all as went in."""
        samples, level = _measure(audio)
        gain = np.divide(LEVEL, level, out=np.ones_like(level), where=level > 0)
        at_model = math.ceil(samples * SAMPLING_RATE / audio.sampling_rate)
        levelled = ((block * gain).astype(np.float32) for block in audio.blocks(BLOCK))
        heard = _resample(levelled, audio.sampling_rate, SAMPLING_RATE, audio.channels, at_model)
        enhanced = self._cross_fade(heard, at_model)
        for block in _resample(
            enhanced, SAMPLING_RATE, audio.sampling_rate, audio.channels, samples
        ):
            yield (block / gain).astype(np.float32)

    def _cross_fade(self, blocks: Iterator[np.ndarray], samples: int) -> Iterator[np.ndarray]:
        """Enhance ``samples`` samples in segments; yield what no later segment changes."""
        hop = self.segment - self.overlap
        fade = (np.arange(self.overlap, dtype=np.float32)[:, None] + 0.5) / max(self.overlap, 1)
        held = next(blocks)
        first = begin = 0  # positions of held[0] and of the next sample to yield
        tail = held[:0]
        while True:
            start = min(begin, max(0, samples - self.segment))
            while len(held) - (start - first) < min(self.segment, samples):
                held = np.concatenate([held, next(blocks)])
            held, first = held[start - first :], start
            enhanced = self._enhance_piece(held[: self.segment])[begin - start :]
            faded = enhanced[: len(tail)]
            faded[:] = tail + fade[: len(tail)] * (faded - tail)
            if begin + self.segment >= samples:
                yield enhanced
                return
            yield enhanced[:hop]
            tail = enhanced[hop:]
            begin += hop

    def _enhance_piece(self, piece: np.ndarray) -> np.ndarray:
        padding = max(0, MIN_SAMPLES - len(piece))
        enhanced = np.empty_like(piece)
        for channel, wave in enumerate(piece.T):
            [output] = self.separate(np.pad(wave, (0, padding))[None], fs=SAMPLING_RATE)
            enhanced[:, channel] = output[0, : len(piece)]
        if not np.isfinite(enhanced).all():
            raise InputError(f"{self.model}: the model gives samples that are not finite")
        return self.dry * piece + (1 - self.dry) * enhanced if self.dry else enhanced


@dataclass(frozen=True)
class EnhanceJob:
    """One output of a run.

    Attributes:
        source: an audio file, or another entry of a ``wav.scp``.
        destination: the file to write.
        utterance: its id, where a ``wav.scp`` lists it.
        seconds: length of a file by its header; 0 for another entry.
        exists: the destination is kept as it is.
    """

    source: str
    destination: Path
    utterance: str | None
    seconds: float
    exists: bool = False


def plan_enhancement(
    inputs: Iterable[Path | str],
    out: Path | str,
    audio_format: str | None = None,
    existing: Existing = "refuse",
    allow_pipes: bool = False,
) -> tuple[list[EnhanceJob], dict[str, str]]:
    """Lay out what enhancing ``inputs`` writes into ``out``; nothing is computed or written.

    Args:
        inputs: audio files (to ``out/<name>``), folders (their audio files, by suffix, to
            ``out/<path in the folder>``) and Kaldi lists, ``*.scp`` (to ``out/<id>.wav``, beside
            which the caller writes ``out/wav.scp``).
        out: folder to write.
        audio_format: suffix of all outputs, instead of the sources' own.
        existing: what to do with outputs that exist.
        allow_pipes: run the commands in lists instead of refusing them.

    Returns:
        The jobs, and what is wrong with audio that can't be enhanced, by its path or entry.

    Raises:
        InputError: an input that is missing; a list with commands; outputs that exist
            (``"refuse"``), that two inputs share, or that are inputs themselves.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder: name one to write to")
    found: list[tuple[str, Path, str | None]] = []
    paths = [Path(path) for path in inputs]
    for path in paths:
        if path.is_dir():
            refuse_overlap(path, out)
            found += [(str(file), out / file.relative_to(path), None) for file in _scan(path)]
        elif path.suffix == ".scp":
            entries = read_table(path)
            if not allow_pipes:
                refuse_pipes(entries, path)
            for utt, entry in entries.items():
                if "/" in utt:
                    raise InputError(f"{path}: id {utt} names a file, so no '/': rename it")
                found.append((entry, out / f"{utt}.wav", utt))
        else:
            if not path.is_file():
                raise InputError(f"{path}: no such file or folder: correct its path")
            found.append((str(path), out / path.name, None))

    for source, _, utterance in found:
        if utterance is None and not is_file(source):
            raise InputError(f"{source}: its name reads as a command: rename the file")
    # realpath: links in a circle are no error of Path.resolve's here, but named later
    taken = {realpath(path) for path in [*map(str, paths), *(entry for entry, _, _ in found)]}
    made: dict[Path, str] = {}
    jobs = []
    wrong = {}
    for source, destination, utterance in found:
        if audio_format:
            destination = destination.with_suffix(f".{audio_format}")
        if destination in made:
            raise InputError(
                f"{destination}: would be written for {made[destination]} and for {source}: "
                "enhance them into folders of their own"
            )
        made[destination] = source
        seconds = 0.0
        if is_file(source):
            try:
                audio = open_recording(source)
                if not audio.num_samples:
                    raise InputError(f"{source}: holds no samples: leave it out")
                _encoding(audio, destination)
            except InputError as error:
                wrong[source] = str(error)
                continue
            seconds = audio.num_samples / audio.sampling_rate
        jobs.append(EnhanceJob(source, destination, utterance, seconds))
    outputs = list(made)
    if any(job.utterance for job in jobs):
        outputs.append(out / "wav.scp")
    for path in outputs:
        if realpath(path) in taken:
            raise InputError(f"{path}: would be written over an input: name another --out")
    there = [path for path in outputs if path.exists()]
    if there and existing == "refuse":
        raise InputError(
            f"{there[0]}: exists ({len(there)} of {len(outputs)} outputs do): give "
            "--skip_existing, --overwrite or another --out"
        )
    if existing == "keep":
        jobs = [replace(job, exists=job.destination.exists()) for job in jobs]
    return jobs, wrong


def _scan(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    audio = [
        path
        for path in files
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")
    ]
    if not audio:
        raise InputError(f"{folder}: no audio files in it, by their suffixes")
    logging.info(
        "%s: %d audio files, %d others ignored", folder, len(audio), len(files) - len(audio)
    )
    return audio


def _encoding(audio: Recording, destination: Path) -> tuple[str, str]:
    """Return soundfile's names of the format and subtype to write.

    A WAV file that would be too long for its header is written as RF64.
    """
    suffix = destination.suffix.lower()
    file_format, subtype = audio.format, audio.subtype
    if suffix != Path(audio.name).suffix.lower():
        file_format = suffix[1:].upper()
        if file_format not in soundfile.available_formats():
            raise InputError(f"{destination}: no audio format by its suffix: name it .wav or .flac")
        plain = subtype.startswith("PCM_") or subtype in FLOAT_SUBTYPES
        if not (plain and soundfile.check_format(file_format, subtype)):
            deep = subtype in (*FLOAT_SUBTYPES, "PCM_32", "ALAC_20", "ALAC_24", "ALAC_32")
            deep = deep and soundfile.check_format(file_format, "PCM_24")
            subtype = "PCM_24" if deep else soundfile.default_subtype(file_format)
    try:
        with soundfile.SoundFile(
            io.BytesIO(), "w", audio.sampling_rate, audio.channels, subtype, format=file_format
        ):
            pass
        width = BYTES.get(subtype, 1)
        if file_format in ("WAV", "WAVEX") and (
            audio.num_samples * audio.channels * width > MAX_WAV_BYTES
        ):
            file_format = "RF64"
    except (soundfile.LibsndfileError, ValueError) as error:
        raise InputError(
            f"{audio.name}: soundfile can't write {file_format} {subtype} of {audio.channels} "
            f"channels at {audio.sampling_rate} Hz: ask for another (--format wav or flac)"
        ) from error
    return file_format, subtype


def _measure(audio: Recording) -> tuple[int, np.ndarray]:
    """Return the number of samples of a channel, and each channel's root mean square ``(C,)``."""
    samples, energy = 0, np.zeros(audio.channels)
    for block in audio.blocks(BLOCK):
        samples += len(block)
        energy += np.square(block, dtype=np.float64).sum(0)
    if not samples:
        raise InputError(f"{audio.name}: holds no samples: leave it out")
    if not np.isfinite(energy).all():
        raise InputError(f"{audio.name}: samples that are not finite (NaN or infinite): mend it")
    if samples < audio.num_samples:
        logging.warning(
            "%s: %d of the %d samples of its header are there: it seems cut short",
            *(audio.name, samples, audio.num_samples),
        )
    return samples, np.sqrt(energy / samples)


def _resample(
    blocks: Iterable[np.ndarray], source: int, target: int, channels: int, samples: int
) -> Iterator[np.ndarray]:
    """Resample blocks ``(t, C)`` from one rate in Hz to another, to ``samples`` in all.

    Zeros follow the input, since soxr rounds the number of samples that it gives.
    """
    if source == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(source, target, channels)
    end = np.zeros((math.ceil(2 * source / target), channels), dtype=np.float32)
    for block in chain(blocks, [end]):
        block = stream.resample_chunk(block, last=block is end)[:samples]
        samples -= len(block)
        yield block
