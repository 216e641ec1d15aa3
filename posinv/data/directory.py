"""Kaldi-style data directories: read, write, validate and format.

A data directory holds ``wav.scp`` (audio), ``spk1.scp`` (its clean reference; it may be absent
where the audio is clean), ``text`` (words), ``phn`` (phonemes separated by spaces) and
``utt2spk``, each ``<utterance id> <rest of line>``, sorted by id in the C locale. Kaldi's other
directories, with ``segments`` or without ``phn``, become one by ``posinv.bin.import_data``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import realpath
from pathlib import Path
from typing import Literal

import numpy as np

from posinv.data.audio import read_audio, write_audio
from posinv.data.files import atomic_folder, file_digest
from posinv.data.parallel import map_parallel
from posinv.data.tables import read_table, read_token_list, write_table
from posinv.errors import InputError

HOP_SECONDS = 0.02  # from frame to frame
FRAME_SECONDS = 0.025  # the receptive field of wav2vec 2.0 and its kin: 400 samples at 16 kHz

MAX_ID = 200  # bytes; names of files have 255 at most

TokenKind = Literal["word", "char", "phn"]
OnBadUtt = Literal["stop", "skip"]  # an utterance that can't be used


@dataclass(frozen=True)
class DataDir:
    """The lists of a data directory, each from utterance id to the rest of its line."""

    wav: dict[str, str]
    spk1: dict[str, str]
    text: dict[str, str]
    phn: dict[str, str]
    utt2spk: dict[str, str]

    @classmethod
    def read(cls, directory: Path | str, skipped: dict[str, str] | None = None) -> "DataDir":
        """Read and check the lists; the audio is not opened.

        Args:
            directory: the data directory.
            skipped: None: utterances that aren't in every list, or whose transcript is empty, are
                refused. Otherwise they are left out, and their ids put in here with the reason.

        Raises:
            InputError: a list is missing, empty, not sorted or has an id twice; ``segments`` is
                there; lists that don't agree; an id that doesn't begin with its speaker's or that
                has a ``/``.
        """
        directory = Path(directory)
        for name, missing in (("phn", True), ("segments", False)):
            if directory.is_dir() and (directory / name).exists() != missing:
                raise InputError(
                    f"{directory / name}: {'no such file' if missing else 'not read here'}: import "
                    f"the directory: python -m posinv.bin.import_data --src {directory} --out OTHER"
                    f"{' --lexicon FILE' if missing else ''}"
                )
        tables = {
            name: read_table(directory / name, skipped is not None)
            for name in _FILES
            if name != "spk1.scp" or (directory / name).exists()
        }
        if skipped is not None:
            tables = _whole(tables, skipped)
            if not tables["wav.scp"]:
                raise InputError(f"{directory}: no utterance is in all lists: {_first(skipped)}")
        data = cls(*(tables.get(name, tables["wav.scp"]) for name in _FILES))
        data.check_lists(directory)
        data._check_ids(directory)
        return data

    def write(self, directory: Path | str) -> None:
        """Write the lists, sorted, into a directory, which is made."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, table in zip(_FILES, self._tables(), strict=True):
            write_table(directory / name, table)

    def only(self, utts: Iterable[str]) -> "DataDir":
        """Return the lists of these utterances alone."""
        utts = list(utts)
        return DataDir(*({utt: table[utt] for utt in utts} for table in self._tables()))

    def _tables(self) -> tuple[dict[str, str], ...]:
        return self.wav, self.spk1, self.text, self.phn, self.utt2spk

    def check_lists(self, directory: Path) -> None:
        """Check that the lists agree; messages name ``directory``.

        Raises:
            InputError: lists that don't have the same ids.
        """
        for name, table in zip(_FILES[1:], self._tables()[1:], strict=True):
            missing, extra = self.wav.keys() - table.keys(), table.keys() - self.wav.keys()
            if missing and name in ("text", "phn"):
                raise InputError(
                    f"{directory / name}: no transcript for utterance {min(missing)} "
                    f"({len(missing)} in all): add it or remove the utterance"
                )
            if missing or extra:
                where = "wav.scp" if missing else name
                raise InputError(
                    f"{directory}: wav.scp and {name} don't match: utterance "
                    f"{min(missing or extra)} is in {where} alone ({len(missing) + len(extra)} "
                    "such): both must list the same utterances"
                )

    def _check_ids(self, directory: Path) -> None:
        for utt, speaker in self.utt2spk.items():
            if len(utt.encode()) > MAX_ID:
                raise InputError(
                    f"{directory / 'utt2spk'}: utterance id {utt[:20]}... of {len(utt)} letters: "
                    f"it names files, so at most {MAX_ID} bytes: rename the utterance"
                )
            if not utt.startswith(speaker) or "/" in utt:
                raise InputError(
                    f"{directory / 'utt2spk'}: utterance id {utt} must begin with its speaker "
                    f"id ({speaker}) and have no '/': rename the utterance"
                )


_FILES = ("wav.scp", "spk1.scp", "text", "phn", "utt2spk")


def _whole(
    tables: Mapping[str, Mapping[str, str]], skipped: dict[str, str]
) -> dict[str, dict[str, str]]:
    """Return the tables with the utterances that each has, and put the others in ``skipped``."""
    for utt in sorted(set().union(*tables.values())):
        lacking = [name for name, table in tables.items() if not table.get(utt)]
        if lacking:
            skipped[utt] = f"nothing in {', '.join(lacking)}"
    return {
        name: {utt: value for utt, value in table.items() if utt not in skipped}
        for name, table in tables.items()
    }


def _first(skipped: Mapping[str, str]) -> str:
    utt, why = next(iter(skipped.items()))
    return f"{utt}: {why} ({len(skipped)} such)"


def refuse_overlap(src: Path | str, out: Path | str) -> None:
    """Raise :class:`InputError` if ``out`` is ``src``, or one lies in the other."""
    a, b = Path(realpath(src)), Path(realpath(out))
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise InputError(f"{out}: the output would overwrite the source {src}: name another")


def check_tokens(
    transcripts: Mapping[str, str], tokens: set[str], kind: TokenKind, name: str
) -> None:
    """Check that every token of the transcripts is known.

    Args:
        transcripts: utterance id to transcript.
        tokens: the known ones; ``<space>`` stands for the blank between words.
        kind: how a transcript splits: ``"char"`` into characters, the others at spaces.
        name: the transcripts' file, for the message.

    Raises:
        InputError: the first unknown token.
    """
    for utt, transcript in transcripts.items():
        for token in _split(transcript, kind):
            if token not in tokens:
                raise InputError(
                    f"{name}: utterance {utt}: unknown {kind} token '{token}': correct the "
                    "transcript or add the token to the list"
                )


def _split(transcript: str, kind: TokenKind) -> list[str]:
    if kind == "char":
        return ["<space>" if token == " " else token for token in transcript]
    return transcript.split()


def check_alignable(utt: str, tokens: Sequence[str], frames: int, kind: TokenKind) -> None:
    """Check that CTC can align tokens with frames: a blank stands between equal neighbours.

    Raises:
        InputError: more tokens, and such blanks, than frames.
    """
    needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))
    if needed > frames:
        raise InputError(
            f"utterance {utt}: {len(tokens)} {kind} tokens need {needed} frames, its audio has "
            f"{frames}: CTC can't align it and would learn nothing from it: correct the "
            "transcript or remove the utterance"
        )


def read_pair(
    utt: str, wav: str, spk1: str, sampling_rate: int, resample: bool, min_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read an utterance's audio and its clean reference, each ``(T,)``.

    Both are the same array where the entries are the same.

    Raises:
        InputError: as :func:`posinv.data.audio.read_audio`; fewer than ``min_samples``; or
            different lengths. The message names the utterance.
    """
    try:
        x = read_audio(wav, sampling_rate, resample)
        clean = x if spk1 == wav else read_audio(spk1, sampling_rate, resample)
    except InputError as error:
        raise InputError(f"utterance {utt}: {error}") from error
    if len(x) < min_samples:
        raise InputError(
            f"utterance {utt}: {wav}: {len(x)} samples, shorter than one frame ({min_samples}): "
            "remove the utterance"
        )
    if len(x) != len(clean):
        raise InputError(
            f"utterance {utt}: {len(x)} samples but {len(clean)} in its clean reference {spk1}: "
            "wav.scp and spk1.scp don't match"
        )
    return x, clean


def validate(
    directory: Path | str,
    sampling_rate: int,
    tokens: Mapping[TokenKind, Path | str] | None = None,
    nj: int = 1,
    align: Mapping[TokenKind, int] | None = None,
) -> int:
    """Check a data directory: lists, transcripts, and every audio file.

    Args:
        directory: the data directory.
        sampling_rate: what all audio must have, in Hz.
        tokens: token lists, by the kind of token, to check the transcripts against.
        nj: number of processes.
        align: kinds of tokens in which CTC must be able to align every transcript, and how many
            frames of the SSL model make one of those that it aligns.

    Returns:
        The total number of samples.

    Raises:
        InputError: the first thing that is wrong.
    """
    data = DataDir.read(directory)
    kinds = dict(tokens or {})
    for kind, path in kinds.items():
        name = "phn" if kind == "phn" else "text"
        check_tokens(_of(data, kind), read_token_list(path), kind, str(Path(directory) / name))
    min_samples = round(FRAME_SECONDS * sampling_rate)

    def check(utt: str) -> int:
        entries = data.wav[utt], data.spk1[utt]
        samples = len(read_pair(utt, *entries, sampling_rate, False, min_samples)[0])
        _check_aligned(utt, data, samples, sampling_rate, align)
        return samples

    return sum(map_parallel(check, data.wav, nj))


def _check_aligned(
    utt: str,
    data: DataDir,
    samples: int,
    sampling_rate: int,
    align: Mapping[TokenKind, int] | None,
) -> None:
    window, hop = round(FRAME_SECONDS * sampling_rate), round(HOP_SECONDS * sampling_rate)
    frames = 1 + (samples - window) // hop
    for kind, joined in (align or {}).items():
        check_alignable(utt, _split(_of(data, kind)[utt], kind), -(-frames // joined), kind)


def _of(data: DataDir, kind: TokenKind) -> dict[str, str]:
    return data.phn if kind == "phn" else data.text


def format_data(
    src: Path | str,
    out: Path | str,
    sampling_rate: int,
    resample: bool = False,
    clean: bool = False,
    audio_format: Literal["flac", "wav"] = "flac",
    min_samples: int | None = None,
    nj: int = 1,
    on_bad_utt: OnBadUtt = "stop",
    align: Mapping[TokenKind, int] | None = None,
) -> tuple[int, int]:
    """Decode a data directory's audio into one file an utterance.

    Beside the lists are ``utt2num_samples`` and ``utt2digest``, a digest of each utterance's audio
    and clean reference, by which a recipe knows whether a result was made from this audio.

    A clean reference that is the audio itself isn't written twice. Where resampling takes an
    utterance beyond [-1, 1], it and its reference are scaled by one factor to a peak of 1.

    Args:
        src: the data directory to read.
        out: the data directory, written atomically; an earlier one is replaced.
        sampling_rate: of all audio, in Hz.
        resample: resample other rates instead of refusing them.
        clean: write the clean reference in place of the audio.
        audio_format: of the files written, 16 bit.
        min_samples: the shortest utterance; default one frame of 25 ms.
        nj: number of processes.
        on_bad_utt: ``"stop"``: the first utterance that is bad is an error. ``"skip"``: those that
            aren't in every list, or whose audio or transcript is bad, are left out, and listed with
            the reason in the file ``skipped``, with those that ``src`` lists there.
        align: see :func:`validate`.

    Returns:
        The total number of samples, and how many utterances were scaled.

    Raises:
        InputError: the first thing that is wrong; with ``"skip"``, only what isn't one utterance's,
            or no utterance that is left.
    """
    refuse_overlap(src, out)
    before = read_skipped(src)
    skipped = dict(before) if on_bad_utt == "skip" else None
    data = DataDir.read(src, skipped)
    if clean:
        data = replace(data, wav=data.spk1)
    out = Path(out)
    min_samples = round(FRAME_SECONDS * sampling_rate) if min_samples is None else min_samples
    with atomic_folder(out, replaces="wav.scp") as fresh:
        (fresh / "audio").mkdir()

        def convert(utt: str) -> tuple[str, str, str, int, str, bool]:
            entries = data.wav[utt], data.spk1[utt]
            x, reference = read_pair(utt, *entries, sampling_rate, resample, min_samples)
            _check_aligned(utt, data, len(x), sampling_rate, align)
            peak = max(np.abs(x).max(), np.abs(reference).max())
            gain = 1 / peak if peak > 1 else 1.0
            wav = spk1 = f"audio/{utt}.{audio_format}"
            write_audio(fresh / wav, np.clip(gain * x, -1, 1), sampling_rate)
            if reference is not x:
                spk1 = f"audio/{utt}.spk1.{audio_format}"
                write_audio(fresh / spk1, np.clip(gain * reference, -1, 1), sampling_rate)
            digest = file_digest(fresh / wav, fresh / spk1)
            paths = str(out / wav), str(out / spk1)
            return utt, *paths, len(x), digest, bool(gain < 1)

        results = skip_bad(map_parallel(skippable(convert, skipped), data.wav, nj), skipped, src)
        utts, wavs, spk1s, lengths, digests, scaled = zip(*results, strict=True)
        wav, spk1 = dict(zip(utts, wavs, strict=True)), dict(zip(utts, spk1s, strict=True))
        DataDir(wav, spk1, data.text, data.phn, data.utt2spk).only(utts).write(fresh)
        write_skipped(fresh, before if skipped is None else skipped)
        write_table(fresh / "utt2num_samples", dict(zip(utts, lengths, strict=True)))
        write_table(fresh / "utt2digest", dict(zip(utts, digests, strict=True)))
    return sum(lengths), sum(scaled)


# ---------------------------------------------------------------------- --on_bad_utt skip


def skippable[Result](
    convert: Callable[[str], Result], skipped: Mapping[str, str] | None
) -> Callable[[str], Result | InputError]:
    """Return ``convert`` of an utterance; where ``skipped`` isn't None, it returns InputErrors."""

    def attempt(utt: str) -> Result | InputError:
        try:
            return convert(utt)
        except InputError as error:
            return InputError(f"{utt}\n{error}")

    return convert if skipped is None else attempt


def skip_bad[Result](
    results: Iterable[Result | InputError], skipped: dict[str, str] | None, src: Path | str
) -> list[Result]:
    """Return the results of :func:`skippable` that are none of errors; put these in ``skipped``.

    Raises:
        InputError: no result is left; ``src`` is named.
    """
    good = []
    for result in results:
        if isinstance(result, InputError):
            assert skipped is not None
            utt, _, why = str(result).partition("\n")
            skipped[utt] = " ".join(why.removeprefix(f"utterance {utt}: ").split())
        else:
            good.append(result)
    if not good:
        raise InputError(f"{src}: no utterance is left: {_first(skipped or {'-': 'none there'})}")
    return good


def read_skipped(directory: Path | str) -> dict[str, str]:
    """Return the reasons, by utterance, of what was left out of a data directory."""
    path = Path(directory) / "skipped"
    return read_table(path) if path.exists() else {}


def write_skipped(directory: Path, skipped: Mapping[str, str]) -> None:
    """Write what :func:`read_skipped` reads, if anything was left out."""
    if skipped:
        write_table(directory / "skipped", skipped)
