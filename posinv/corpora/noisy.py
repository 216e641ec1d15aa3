"""Noises, recordings of them, and noisy sets: clean speech mixed with them at an SNR.

What is drawn for a noisy utterance, or a recording, is a function of its id and the seed alone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soxr

from posinv.augment.draws import generator
from posinv.augment.noise import FADE_SECONDS, NOISES, _unit, excerpt
from posinv.data.audio import AUDIO_SUFFIXES, UNREADABLE_SUFFIXES, read_audio, write_audio
from posinv.data.directory import (
    DataDir,
    OnBadUtt,
    read_skipped,
    refuse_overlap,
    skip_bad,
    skippable,
    write_skipped,
)
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_parallel
from posinv.data.tables import write_table
from posinv.errors import InputError

SEEN = ("white", "pink", "babble", "hum")
UNSEEN = ("brown", "modulated", "impulsive")

MANIFEST_COLUMNS = (
    *("utt", "source_utt", "noise", "snr_db", "speed", "silence_s", "gain", "noise_source"),
)

_PEAK = 0.99  # samples with a higher peak are scaled down to it
_DRAWS = 20  # of a noise, until one is not silent: recordings have silent stretches
_RECORDING_RMS = 0.1

NOISE_TYPES = (*NOISES, "babble", "recorded")


@dataclass(frozen=True)
class Mixing:
    """How a noisy set is drawn.

    Attributes:
        noise_types: of :data:`NOISE_TYPES`; one is drawn for each utterance.
        snrs: in dB; one is drawn for each utterance.
        seed: of every draw.
        tag: ends the noisy utterances' ids.
        silence: range in seconds of the silence put in front of the clean speech.
        speeds: factors, one of which is drawn for each utterance; the clean speech is
            resampled, so that its pitch moves too.
        babble: directory of the speech that babble is made of.
        recorded: audio files, or directories of them, for the noise type ``recorded``. Of several
            channels the first is taken.
        sampling_rate: of everything, in Hz.
        resample: resample audio of other rates instead of refusing it.

    Raises:
        InputError: an unknown noise type, or a value out of range.
    """

    noise_types: Sequence[str]
    snrs: Sequence[float]
    seed: int
    tag: str
    silence: tuple[float, float] | None = None
    speeds: Sequence[float] = (1.0,)
    babble: Path | None = None
    recorded: Sequence[Path] = ()
    sampling_rate: int = 16000
    resample: bool = False

    def __post_init__(self) -> None:
        _check_types(self.noise_types, NOISE_TYPES, self.babble)
        if not self.noise_types or not self.snrs or not self.speeds:
            raise InputError("--noise_types, --snrs and --speeds each need at least one value")
        if not all(map(math.isfinite, self.snrs)):
            raise InputError(f"--snrs: {' '.join(map(str, self.snrs))}: finite numbers, in dB")
        if not all(0.25 <= speed <= 4 for speed in self.speeds):
            raise InputError(f"--speeds: {' '.join(map(str, self.speeds))}: from 0.25 to 4")
        if self.silence and not 0 <= self.silence[0] <= self.silence[1] < math.inf:
            low, high = self.silence
            raise InputError(f"--silence: {low} {high}: two lengths in seconds, shorter first")
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.tag):
            raise InputError(f"--tag: '{self.tag}': letters, digits and '_' only")
        if "recorded" in self.noise_types and not self.recorded:
            raise InputError("--recorded: the noise type 'recorded' needs files or directories")


def _check_types(noise_types: Sequence[str], known: Sequence[str], babble: Path | None) -> None:
    for noise in noise_types:
        if noise not in known:
            raise InputError(
                f"--noise_types: unknown type '{noise}': choose from {' '.join(known)}"
            )
    if "babble" in noise_types and not babble:
        raise InputError("--babble_src: the noise type 'babble' needs a data directory")


def mix_noise(
    src: Path | str,
    out: Path | str,
    mixing: Mixing,
    copies: int = 1,
    nj: int = 1,
    on_bad_utt: OnBadUtt = "stop",
) -> int:
    """Write a noisy copy of a clean data directory.

    Speed first, then silence in front, then noise over the whole. The SNR is that of the
    speech without the silence put in front of it against the noise over the same samples. A
    mix that would pass a peak of 0.99 is scaled down to it together with its reference.
    ``manifest.tsv`` holds the draws.

    Args:
        src: the data directory of clean speech.
        out: the data directory, written atomically; an earlier one is replaced. Its utterances
            are ``<utt>-<tag>``, ``<utt>-<tag>2``, ...
        mixing: what to draw from.
        copies: number of noisy copies of each utterance.
        nj: number of processes.
        on_bad_utt: as :func:`posinv.data.directory.format_data`, of clean speech.

    Returns:
        The number of utterances written.

    Raises:
        InputError: bad input, as :class:`Mixing`, :meth:`posinv.data.directory.DataDir.read` and
            :func:`posinv.data.audio.read_audio`; silent speech; no other speech for babble;
            audio with a clean reference of its own, which is noisy already.
    """
    refuse_overlap(src, out)
    if copies < 1:
        raise InputError(f"--copies {copies}: at least 1")
    before = read_skipped(src)
    skipped = dict(before) if on_bad_utt == "skip" else None
    data = DataDir.read(src, skipped)
    paired = [utt for utt, entry in data.wav.items() if data.spk1[utt] != entry]
    if paired:
        raise InputError(
            f"{Path(src) / 'spk1.scp'}: utterance {paired[0]} ({len(paired)} such) has a clean "
            "reference of its own, so its audio is noisy already: run.sh --mix_noise false uses "
            "such pairs as they are; to mix noise into clean speech, list that in wav.scp"
        )
    noises = _Noises(
        mixing.noise_types,
        mixing.babble,
        mixing.recorded,
        mixing.sampling_rate,
        mixing.resample,
        on_bad_utt,
    )
    out = Path(out)
    tags = [mixing.tag if copy == 1 else f"{mixing.tag}{copy}" for copy in range(1, copies + 1)]
    with atomic_folder(out, replaces="wav.scp") as fresh:
        (fresh / "audio").mkdir()

        def mix(utt: str) -> tuple[str, str, tuple[str, ...]]:
            source = jobs[utt]
            entry = data.wav[source]
            try:
                clean, noisy, row = _mix(utt, entry, data.utt2spk[source], source, mixing, noises)
            except InputError as error:
                raise InputError(f"utterance {source}: {error}") from error
            write_audio(fresh / "audio" / f"{utt}.flac", noisy, mixing.sampling_rate)
            if clean is not None:
                entry = str(out / "audio" / f"{utt}.spk1.flac")
                write_audio(fresh / "audio" / f"{utt}.spk1.flac", clean, mixing.sampling_rate)
            return utt, entry, (utt, source, *row)

        jobs = {f"{source}-{tag}": source for source in data.wav for tag in tags}
        if clash := jobs.keys() & data.wav.keys():
            raise InputError(f"--tag {mixing.tag}: {min(clash)} is an utterance of {src} already")
        done = skip_bad(map_parallel(skippable(mix, skipped), sorted(jobs), nj), skipped, src)
        jobs = {utt: jobs[utt] for utt, _, _ in done}
        DataDir(
            {utt: str(out / "audio" / f"{utt}.flac") for utt in jobs},
            {utt: entry for utt, entry, _ in done},
            {utt: data.text[source] for utt, source in jobs.items()},
            {utt: data.phn[source] for utt, source in jobs.items()},
            {utt: data.utt2spk[source] for utt, source in jobs.items()},
        ).write(fresh)
        write_skipped(fresh, before if skipped is None else skipped)
        rows = [MANIFEST_COLUMNS, *(row for _, _, row in done)]
        lines = "".join("\t".join(row) + "\n" for row in rows)
        (fresh / "manifest.tsv").write_text(lines, encoding="utf-8")
    return len(done)


def _mix(
    utt: str, entry: str, speaker: str, source: str, mixing: Mixing, noises: "_Noises"
) -> tuple[np.ndarray | None, np.ndarray, tuple[str, ...]]:
    # The clean reference where it differs from the source, the mix, the manifest's columns.
    rng = generator(utt, mixing.seed)
    noise_type = str(rng.choice(list(mixing.noise_types)))
    snr = float(rng.choice(list(mixing.snrs)))
    speed = float(rng.choice(list(mixing.speeds)))
    seconds = rng.uniform(*mixing.silence) if mixing.silence else 0.0

    rate = mixing.sampling_rate
    original = read_audio(entry, rate, mixing.resample).astype(np.float64)
    speech = original if speed == 1 else soxr.resample(original, rate * speed, rate)
    silence = round(seconds * rate)
    clean = np.concatenate([np.zeros(silence), speech])
    speech_power = np.mean(speech**2)
    if not speech_power > 0:
        raise InputError(f"{entry}: silent, so that it has no SNR: remove the utterance")
    for _ in range(_DRAWS):
        noise, noise_source = noises.draw(noise_type, rng, len(clean), speaker, source)
        noise_power = np.mean(noise[silence:] ** 2)
        if noise_power > 0:
            break
    else:
        raise InputError(
            f"{noise_source}: silent, as {_DRAWS - 1} other draws of {noise_type} noise were: "
            "leave silent recordings out"
        )
    noisy = clean + noise * math.sqrt(speech_power / noise_power / 10 ** (snr / 10))
    gain = min(1.0, _PEAK / max(np.abs(noisy).max(), np.abs(clean).max()))
    row = f"{snr:g}", f"{speed:g}", f"{silence / rate:.6f}", f"{gain:.6f}", noise_source
    same = speed == 1 and not silence and gain == 1
    return None if same else gain * clean, gain * noisy, (noise_type, *row)


def write_noise(
    out: Path | str,
    noise_types: Sequence[str],
    seconds: float,
    seed: int,
    babble: Path | None = None,
    nj: int = 1,
    sampling_rate: int = 16000,
    resample: bool = False,
    on_bad_utt: OnBadUtt = "stop",
) -> int:
    """Write a folder of synthetic noise recordings, one FLAC file a type, listed in ``wav.scp``.

    Args:
        out: the folder, written atomically; an earlier one is replaced.
        noise_types: of :data:`NOISE_TYPES` but ``recorded``; they are the recordings' ids.
        seconds: length of each.
        seed: of every draw.
        babble: data directory of the speech that babble is made of.
        nj: number of processes.
        sampling_rate: of everything, in Hz.
        resample: resample speech of other rates instead of refusing it.
        on_bad_utt: ``"skip"``: draw babble from the utterances that can be read.

    Returns:
        The number of recordings written. Their RMS is 0.1, or what a peak of 0.99 leaves.

    Raises:
        InputError: an unknown noise type or none, a length that isn't one or more samples,
            babble without speech.
    """
    _check_types(noise_types, (*NOISES, "babble"), babble)
    if not noise_types:
        raise InputError("--noise_types: name at least one")
    if not (math.isfinite(seconds) and seconds * sampling_rate >= 1):
        raise InputError(f"--seconds {seconds}: a length of at least one sample")
    if babble:
        refuse_overlap(babble, out)
    out = Path(out)
    noises = _Noises(noise_types, babble, (), sampling_rate, resample, on_bad_utt)
    with atomic_folder(out, replaces="wav.scp") as fresh:

        def record(noise_type: str) -> None:
            rng = generator(noise_type, seed)
            x, source = noises.draw(noise_type, rng, round(seconds * sampling_rate), "", "")
            power = np.mean(x**2)
            if not power > 0:
                raise InputError(f"{noise_type} ({source}): silent: lengthen it or leave it out")
            gain = min(_RECORDING_RMS / math.sqrt(power), _PEAK / np.abs(x).max())
            write_audio(fresh / f"{noise_type}.flac", gain * x, sampling_rate)

        types = sorted(set(noise_types))
        for _ in map_parallel(record, types, nj):
            pass
        write_table(fresh / "wav.scp", {name: out / f"{name}.flac" for name in types})
    return len(types)


class _Noises:
    """Every noise type behind one call."""

    def __init__(
        self,
        noise_types: Sequence[str],
        babble: Path | None,
        recorded: Sequence[Path],
        rate: int,
        resample: bool,
        on_bad_utt: OnBadUtt,
    ):
        self.rate, self.resample = rate, resample
        self.skip = on_bad_utt == "skip"
        self.fade = round(FADE_SECONDS * rate)
        self.talk = None
        if babble and "babble" in noise_types:
            self.talk = DataDir.read(babble, {} if self.skip else None)
        self.recordings = _audio_files(recorded) if "recorded" in noise_types else ()

    def draw(
        self, noise_type: str, rng: np.random.Generator, num_samples: int, speaker: str, source: str
    ) -> tuple[np.ndarray, str]:
        """Return noise ``(num_samples,)`` of any power, and where it comes from."""
        if noise_type == "babble":
            return self._babble(rng, num_samples, speaker, source)
        if noise_type == "recorded":
            path = self.recordings[rng.integers(len(self.recordings))]
            x, start = excerpt(self._read(path, channel=1), num_samples, rng, self.fade)
            return x.astype(np.float64), f"{path}@{start}"
        return NOISES[noise_type](rng, num_samples, self.rate), "-"

    def _babble(
        self, rng: np.random.Generator, num_samples: int, speaker: str, source: str
    ) -> tuple[np.ndarray, str]:
        assert self.talk, "_check_types asks for speech with the type babble"
        entries, speakers = self.talk.spk1, self.talk.utt2spk
        others = [utt for utt in speakers if speakers[utt] != speaker]
        others = others or [utt for utt in entries if utt != source]
        while True:
            if not others:
                raise InputError("--babble_src: no other utterance to make babble of")
            count = min(int(rng.integers(4, 7)), len(others))
            chosen = [others[i] for i in rng.choice(len(others), count, replace=False)]
            if not (bad := [utt for utt in chosen if not self._readable(entries[utt])]):
                break
            others = [utt for utt in others if utt not in bad]
        talk = (self._read(entries[utt]) for utt in chosen)
        voices = [_unit(excerpt(x, num_samples, rng, self.fade)[0]) for x in talk]
        return np.sum(voices, axis=0, dtype=np.float64), ",".join(chosen)

    def _readable(self, entry: str) -> bool:
        """Whether an utterance may be used: without --on_bad_utt skip, reading it says no."""
        try:
            self._read(entry)
        except InputError:
            return not self.skip
        return True

    def _read(self, entry: str, channel: int | None = None) -> np.ndarray:
        return _read_cached(entry, self.rate, self.resample, channel)


@lru_cache(maxsize=32)
def _read_cached(entry: str, sampling_rate: int, resample: bool, channel: int | None) -> np.ndarray:
    return read_audio(entry, sampling_rate, resample, channel)


def _audio_files(sources: Sequence[Path]) -> tuple[str, ...]:
    files = []
    for source in map(Path, sources):
        if source.is_file():
            files.append(str(source))
            continue
        paths = sorted(source.rglob("*"))
        if strange := [path for path in paths if path.suffix.lower() in UNREADABLE_SUFFIXES]:
            raise InputError(
                f"--recorded: {strange[0]} ({len(strange)} such): a format that soundfile can't "
                "read: convert it (ffmpeg -i FILE FILE.flac), or move it elsewhere"
            )
        found = [str(path) for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
        if not found:
            raise InputError(f"--recorded: {source}: no audio files there: correct the path")
        files.extend(sorted(found))
    return tuple(files)
