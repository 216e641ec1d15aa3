"""Connected digits from the Free Spoken Digit Dataset (Jackson and contributors, CC BY-SA 4.0)."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import soxr

from posinv.augment.draws import generator
from posinv.corpora.prepared import Contents, Prepared, wanted_minutes
from posinv.data.audio import SAMPLING_RATE, read_audio, write_audio
from posinv.data.directory import DataDir
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_parallel
from posinv.errors import InputError

RECORDED_RATE = 8000

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# CMUdict, without stress.
PHONEMES = (
    *("Z IH R OW", "W AH N", "T UW", "TH R IY", "F AO R"),
    *("F AY V", "S IH K S", "S EH V AH N", "EY T", "N AY N"),
)

_FRACTIONS = {"dev": 0.08, "test": 0.12}  # of a speaker's recordings of a digit; at least one
_PAUSE_SECONDS = (0.05, 0.25)

Recordings = dict[str, dict[int, list[Path]]]  # by speaker and digit, in the order of the index


def find_recordings(directory: Path | str) -> Recordings:
    """List ``{digit}_{speaker}_{index}.wav`` files by speaker and digit.

    Raises:
        InputError: no such directory, no recordings in it, or a WAV file of another name.
    """
    directory = Path(directory)
    paths = directory.glob("*.wav")
    found: dict[str, dict[int, dict[int, Path]]] = {}
    for path in sorted(paths):
        match = re.fullmatch(r"(\d)_([A-Za-z0-9]+)_(\d+)", path.stem)
        if not match:
            raise InputError(
                f"{path}: not named {{digit}}_{{speaker}}_{{index}}.wav: rename or remove it"
            )
        digit, speaker, index = int(match[1]), match[2], int(match[3])
        taken = found.setdefault(speaker, {}).setdefault(digit, {})
        if index in taken:
            raise InputError(f"{path}: the same recording as {taken[index].name}: remove one")
        taken[index] = path
    if not found:
        raise InputError(f"{directory}: no recordings there: set FSDD to the unpacked dataset")
    return {
        speaker: {
            digit: [path for _, path in sorted(taken.items())]
            for digit, taken in sorted(digits.items())
        }
        for speaker, digits in sorted(found.items())
    }


def split_recordings(recordings: Recordings, seed: int) -> dict[str, dict[str, list[Path]]]:
    """Share recordings out, each to one of train, dev and test (80, 8 and 12 %).

    Returns:
        Split to speaker to recordings.

    Raises:
        InputError: a speaker has fewer than three recordings of a digit.
    """
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "dev": {}, "test": {}}
    for speaker, digits in recordings.items():
        for digit, paths in digits.items():
            if len(paths) < 3:
                raise InputError(
                    f"{paths[0].parent}: {len(paths)} recordings of digit {digit} by {speaker}: "
                    "at least 3 are needed to have one in each split"
                )
            order = generator(seed, speaker, digit).permutation(len(paths))
            start = 0
            for split, fraction in _FRACTIONS.items():
                size = max(1, round(fraction * len(paths)))
                chosen = order[start : start + size]
                splits[split].setdefault(speaker, []).extend(paths[i] for i in chosen)
                start += size
            splits["train"].setdefault(speaker, []).extend(paths[i] for i in order[start:])
    return splits


def prepare(
    src: Path | str,
    out: Path | str,
    *,
    minutes: float = 27.0,
    dev_minutes: float = 1.5,
    test_minutes: float = 3.0,
    seed: int = 0,
    nj: int = 1,
) -> Prepared:
    """Write ``out/train``, ``out/dev`` and ``out/test`` of 3-6 connected digits an utterance.

    Beside them is ``out/test_queries``, for query-by-example search in the test set: one digit an
    utterance, of each speaker, recordings of the development split as they are.

    Each other utterance joins recordings of one speaker, resampled from 8 kHz, with pauses of
    0.05-0.25 s. A split goes through a speaker's recordings in random order, again and again
    until its minutes are reached; no recording is in two splits.

    Args:
        src: directory of ``{digit}_{speaker}_{index}.wav``.
        out: parent of the data directories; earlier ones are replaced.
        minutes: of training speech, at least, shared evenly by the speakers.
        dev_minutes: of development speech, at least.
        test_minutes: of test speech, at least.
        seed: of the split and of everything drawn.
        nj: number of processes.

    Raises:
        InputError: as :func:`find_recordings`, :func:`split_recordings` and
            :func:`posinv.data.audio.read_audio`; minutes not above zero.
    """
    wanted = wanted_minutes(minutes, dev_minutes, test_minutes, limit=10000)
    splits = split_recordings(find_recordings(src), seed)
    made = {}
    with ExitStack() as stack:
        for name in (*splits, "test_queries"):
            final = Path(out) / name
            fresh = stack.enter_context(atomic_folder(final, replaces="wav.scp"))
            (fresh / "audio").mkdir()
            write: Callable[[tuple[str, list[Path]]], tuple[dict[str, str], int]]
            if name == "test_queries":
                speakers = splits["dev"]
                write = partial(_write_queries, out=fresh)
            else:
                speakers = splits[name]
                share = wanted[name] * 60 * SAMPLING_RATE / len(speakers)
                write = partial(_join_speaker, split=name, share=share, out=fresh, seed=seed)
            digits: dict[str, str] = {}
            total = 0
            for said, samples in map_parallel(write, speakers.items(), nj):
                digits |= said
                total += samples
            wav = {utt: str(final / "audio" / f"{utt}.flac") for utt in digits}
            data = DataDir(
                wav,
                wav,
                {utt: " ".join(WORDS[int(d)] for d in said) for utt, said in digits.items()},
                {utt: " ".join(PHONEMES[int(d)] for d in said) for utt, said in digits.items()},
                {utt: utt.partition("-")[0] for utt in digits},
            )
            data.write(fresh)
            made[final] = Contents.of(data, total / 60 / SAMPLING_RATE)
    return Prepared(made)


def _join_speaker(
    recordings: tuple[str, list[Path]], split: str, share: float, out: Path, seed: int
) -> tuple[dict[str, str], int]:
    # Utterance id to digits, and the number of samples written.
    speaker, paths = recordings
    rng = generator(seed, split, speaker)
    endless = _again_and_again(paths, rng)
    said: dict[str, str] = {}
    total = 0
    while total < share:
        chosen = [next(endless) for _ in range(rng.integers(3, 7))]
        digits = "".join(path.name[0] for path in chosen)
        utt = f"{speaker}-{split}{len(said):04d}-{digits}"
        x = _join([_read(path) for path in chosen], rng)
        write_audio(out / "audio" / f"{utt}.flac", x, SAMPLING_RATE)
        said[utt] = digits
        total += len(x)
    return said, total


def _write_queries(recordings: tuple[str, list[Path]], out: Path) -> tuple[dict[str, str], int]:
    # As _join_speaker.
    speaker, paths = recordings
    said: dict[str, str] = {}
    total = 0
    for digit, path in {path.name[0]: path for path in paths}.items():
        utt = f"{speaker}-query-{digit}"
        x = _within_range(_read(path))
        write_audio(out / "audio" / f"{utt}.flac", x, SAMPLING_RATE)
        said[utt] = digit
        total += len(x)
    return said, total


def _again_and_again(paths: list[Path], rng: np.random.Generator) -> Iterator[Path]:
    while True:
        yield from (paths[i] for i in rng.permutation(len(paths)))


def _join(recordings: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    low, high = _PAUSE_SECONDS
    parts = [recordings[0]]
    for recording in recordings[1:]:
        parts += [np.zeros(round(rng.uniform(low, high) * SAMPLING_RATE)), recording]
    return _within_range(np.concatenate(parts))


def _within_range(x: np.ndarray) -> np.ndarray:
    return x / max(1.0, np.abs(x).max())  # resampling may overshoot


@lru_cache(maxsize=4096)
def _read(path: Path) -> np.ndarray:
    x = read_audio(str(path), RECORDED_RATE)
    return soxr.resample(x, RECORDED_RATE, SAMPLING_RATE)
