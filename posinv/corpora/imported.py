"""Data directories made of what others have prepared: Kaldi's directories and Lhotse's cuts.

The source is only read. Utterances are renamed ``<speaker>-<utterance>`` where their id doesn't
begin with the speaker's. A piece of a recording becomes a 16-bit FLAC file at the recording's own
rate; only one piece is in memory at a time.
"""

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posinv.corpora.lexicon import Lexicon
from posinv.corpora.prepared import Contents, Prepared
from posinv.data.audio import open_recording, refuse_pipes, write_audio
from posinv.data.directory import DataDir, refuse_overlap
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_parallel
from posinv.data.tables import read_table
from posinv.errors import InputError

if TYPE_CHECKING:
    from lhotse import SupervisionSegment
    from lhotse.cut import Cut, MonoCut, MultiCut

# Segments often end a little after their recording, by rounding or by a frame of alignment.
# Lhotse's import of Kaldi directories allows as much.
MAX_OVERSHOOT = 0.1  # seconds
_LONGEST = 1e7  # seconds of a recording


@dataclass(frozen=True)
class _Piece:
    """From ``start`` seconds of a recording to ``end``, infinite for the recording's.

    ``channel`` is the segment's own, 1 for the first.
    """

    recording: str
    start: float
    end: float
    channel: int | None = None


def import_kaldi(
    src: Path | str,
    out: Path | str,
    *,
    lexicon: Lexicon | None = None,
    wav_root: Path | str = ".",
    channel: int | None = None,
    max_overshoot: float = MAX_OVERSHOOT,
    allow_pipes: bool = False,
    nj: int = 1,
) -> Prepared:
    """Make a data directory of a Kaldi directory.

    It has ``wav.scp`` (files, archives, commands), ``text``, ``utt2spk``, and may have ``segments``
    (times in seconds, an end of -1 for the recording's end, perhaps a channel from 0),
    ``reco2file_and_channel`` (channels as letters from A, or numbers from 1), ``spk1.scp`` and
    ``phn``.

    Args:
        src: the Kaldi directory.
        out: the data directory, written atomically; an earlier one is replaced.
        lexicon: makes ``phn`` if the Kaldi directory has none.
        wav_root: where the relative paths of ``wav.scp`` and ``spk1.scp`` start, and commands.
        channel: which of the recordings' channels, 1 for the first, 0 for their mean, where the
            Kaldi directory doesn't say. It is written as FLAC. Without either, recordings of
            several channels are refused.
        max_overshoot: seconds by which a segment may end after its recording. It is cut at the
            recording's end, and counted in the notes.
        allow_pipes: run the commands in ``wav.scp`` and ``spk1.scp`` instead of refusing them.
        nj: number of processes.

    Raises:
        InputError: as :meth:`~posinv.data.directory.DataDir.read`; commands without
            ``allow_pipes``; a segment of no recording, or one that ends too late; no ``phn`` and no
            lexicon, or a word that it lacks.
    """
    src, out = Path(src), Path(out)
    refuse_overlap(src, out)
    if not src.is_dir():
        raise InputError(f"{src}: no such Kaldi directory: correct its path")
    audio = {}
    for kind in ("wav", "spk1"):
        path = src / f"{kind}.scp"
        if kind == "spk1" and not path.exists():
            continue
        entries = read_table(path)
        if not allow_pipes:
            refuse_pipes(entries, path)
        audio[kind] = _rooted(entries, wav_root)
    text, utt2spk = (read_table(src / name) for name in ("text", "utt2spk"))
    channels = _read_channels(src / "reco2file_and_channel")
    segments = None
    if (src / "segments").exists():
        segments = _read_segments(src / "segments")
    elif channel is not None or channels:
        segments = {utt: _Piece(utt, 0, math.inf) for utt in audio["wav"]}
    utts = segments or audio["wav"]
    shortened = 0
    if (src / "phn").exists():
        phn = read_table(src / "phn")
        lexicon = None
    else:
        phn = _phonemes(text, lexicon, src / "phn")
    placeholder = dict.fromkeys(utts, "")
    wav = audio["wav"] if segments is None else placeholder
    spk1 = audio.get("spk1", wav) if segments is None else placeholder
    names = {utt: _utterance_id(utt, speaker, src) for utt, speaker in utt2spk.items()}
    DataDir(wav, spk1, text, phn, utt2spk).check_lists(src)
    with atomic_folder(out, replaces="wav.scp") as fresh:
        if segments is not None:
            (fresh / "audio").mkdir()
            jobs = [
                (kind, recording, pieces)
                for kind in audio
                for recording, pieces in _by_recording(segments, audio[kind], src).items()
            ]

            def cut(job: tuple[str, str, dict[str, _Piece]]) -> int:
                kind, recording, pieces = job
                suffix = "" if kind == "wav" else f".{kind}"
                files = {fresh / "audio" / f"{names[u]}{suffix}.flac": u for u in pieces}
                chosen = {file: pieces[utt] for file, utt in files.items()}
                entry, where = audio[kind][recording], src / "segments"
                channels_given = (channels.get(recording), channel)
                return _cut_out(entry, chosen, where, *channels_given, max_overshoot)

            shortened = sum(map_parallel(cut, jobs, nj))
            wav = {utt: str(out / "audio" / f"{names[utt]}.flac") for utt in segments}
            spk1 = wav
            if "spk1" in audio:
                spk1 = {utt: str(out / "audio" / f"{names[utt]}.spk1.flac") for utt in segments}
        data = _renamed(DataDir(wav, spk1, text, phn, utt2spk), names)
        data.write(fresh)
    return _report(out, data, names, len(segments or ()), shortened, lexicon)


def import_cuts(
    src: Path | str,
    out: Path | str,
    *,
    lexicon: Lexicon | None = None,
    wav_root: Path | str = ".",
    channel: int | None = None,
    max_overshoot: float = MAX_OVERSHOOT,
    allow_pipes: bool = False,
    nj: int = 1,
) -> Prepared:
    """Make a data directory of Lhotse's cuts (``cuts.jsonl.gz``): one utterance a supervision.

    Their lazy operations (speed, volume, another sampling rate) are applied. A supervision without
    a speaker gets one of its own, named as the utterance.

    Args:
        src: the manifest, read line by line.
        out: as :func:`import_kaldi`.
        lexicon: makes ``phn``.
        wav_root: where the relative paths of recordings start.
        channel: which channel of a ``MultiCut``, 1 for the first, 0 for their mean. Without it,
            they are refused. A ``MonoCut`` has its own.
        max_overshoot: as :func:`import_kaldi`, of a supervision and its cut.
        allow_pipes: run the commands that recordings name as their audio instead of refusing them.
        nj: number of processes.

    Raises:
        InputError: no lhotse; no cuts, or others than ``MonoCut`` and ``MultiCut``; audio at an
            address of the network, or from a command without ``allow_pipes``; a channel that a
            ``MultiCut`` hasn't; a cut without supervisions; a supervision without text or beyond
            its cut, or whose id is there twice; no lexicon, or
            a word that it lacks; audio that can't be read.
    """
    src, out = Path(src), Path(out)
    if not src.is_file():
        raise InputError(f"{src}: no such file: correct its path")
    text: dict[str, str] = {}
    utt2spk: dict[str, str] = {}
    for cut in _read_cuts(src):
        with _reading(cut, src):
            if not allow_pipes:
                refuse_pipes(_commands(cut), src)
            for supervision in _supervisions(cut, src, channel, max_overshoot):
                utt = supervision.id
                if utt in text:
                    raise InputError(f"{src}: supervision {utt} is there twice: rename one")
                text[utt] = " ".join((supervision.text or "").split())
                utt2spk[utt] = supervision.speaker or utt
                if not text[utt]:
                    raise InputError(f"{src}: supervision {utt}: no text: leave it out of the cuts")
                if not (isinstance(utt, str) and isinstance(utt2spk[utt], str)):
                    raise TypeError(f"id {utt!r} or speaker {utt2spk[utt]!r} is no text")
    if not text:
        raise InputError(f"{src}: no cuts in it: make them anew (lhotse cut simple ...)")
    phn = _phonemes(text, lexicon, src)
    names = {utt: _utterance_id(utt, speaker, src) for utt, speaker in utt2spk.items()}
    with atomic_folder(out, replaces="wav.scp") as fresh:
        (fresh / "audio").mkdir()

        def save(cut: "MonoCut | MultiCut") -> int:
            with _reading(cut, src):
                return save_pieces(cut)

        def save_pieces(cut: "MonoCut | MultiCut") -> int:
            cut = cut.with_recording_path_prefix(wav_root)
            shortened = 0
            for supervision in _supervisions(cut, src, channel, max_overshoot):
                shortened += supervision.end > cut.duration + 1 / cut.sampling_rate
                path = fresh / "audio" / f"{names[supervision.id]}.flac"
                piece = cut.truncate(
                    offset=max(0, supervision.start),
                    duration=min(supervision.end, cut.duration) - max(0, supervision.start),
                )
                try:
                    x = piece.load_audio()
                except Exception as error:  # lhotse's readers raise many kinds
                    raise InputError(
                        f"{src}: cut {cut.id}: its audio can't be read ({error}): mend the manifest"
                    ) from error
                x = x[channel - 1] if channel and len(x) > 1 else x.mean(0)
                write_audio(path, x, cut.sampling_rate)
            return shortened

        shortened = sum(map_parallel(save, _read_cuts(src), nj))
        wav = {utt: str(out / "audio" / f"{names[utt]}.flac") for utt in names}
        data = _renamed(DataDir(wav, wav, text, phn, utt2spk), names)
        data.write(fresh)
    return _report(out, data, names, len(names), shortened, lexicon)


def _rooted(table: dict[str, str], root: Path | str) -> dict[str, str]:
    root = Path(root).resolve()
    return {
        key: f"cd {shlex.quote(str(root))} && {entry}" if entry.endswith("|") else str(root / entry)
        for key, entry in table.items()
    }


def _read_channels(path: Path) -> dict[str, int]:
    """Channels of recordings, from 1."""
    channels = {}
    for recording, line in read_table(path).items() if path.exists() else ():
        name = line.split()[-1]
        if name.isascii() and name.isdecimal() and 0 < int(name) < 1000:
            channels[recording] = int(name)
        elif len(name) == 1 and "A" <= name <= "Z":
            channels[recording] = ord(name) - ord("A") + 1
        else:
            raise InputError(f"{path}: {recording}: channel {name}: must be A, B, ... or 1, 2, ...")
    return channels


def _read_segments(path: Path) -> dict[str, _Piece]:
    pieces = {}
    for utt, line in read_table(path).items():
        try:
            recording, start, end, *rest = line.split()
            channels: list[int | None] = [int(number) + 1 for number in rest] or [None]
            [channel] = channels
            if channel is not None and channel < 1:
                raise ValueError
            end_s = math.inf if float(end) < 0 else float(end)
            piece = _Piece(recording, float(start), end_s, channel)
        except ValueError:
            raise InputError(
                f"{path}: utterance {utt}: '{line}' must be a recording and two times in seconds, "
                "perhaps followed by a channel's number from 0"
            ) from None
        ends = math.isinf(piece.end) or piece.end < _LONGEST
        if not (0 <= piece.start < min(piece.end, _LONGEST) and ends):
            raise InputError(f"{path}: utterance {utt}: from {start} to {end} s: correct the times")
        pieces[utt] = piece
    return pieces


def _by_recording(
    segments: dict[str, _Piece], recordings: dict[str, str], src: Path
) -> dict[str, dict[str, _Piece]]:
    found: dict[str, dict[str, _Piece]] = {}
    for utt, piece in segments.items():
        if piece.recording not in recordings:
            raise InputError(
                f"{src / 'segments'}: utterance {utt}: no recording {piece.recording} in the "
                ".scp file: add it, or remove the segment"
            )
        found.setdefault(piece.recording, {})[utt] = piece
    return found


def _cut_out(
    entry: str,
    pieces: dict[Path, _Piece],
    segments: Path,
    recorded_channel: int | None,
    channel: int | None,
    max_overshoot: float,
) -> int:
    """Write the pieces of a recording; returns how many of them end after it."""
    recording = open_recording(entry)
    rate, samples = recording.sampling_rate, recording.num_samples
    if recording.channels == 1:
        recorded_channel = None  # a command of wav.scp has taken it out, as Kaldi's recipes do
    shortened = 0
    for path, piece in pieces.items():
        start = round(piece.start * rate)
        stop = samples if math.isinf(piece.end) else round(piece.end * rate)
        if start >= min(stop, samples) or stop > samples + max_overshoot * rate:
            raise InputError(
                f"{segments}: {path.stem}: from {piece.start:g} to "
                f"{stop / rate:g} s of {piece.recording}, which has {samples / rate:g} s: correct "
                "the segment, remove it, or allow more (--max_overshoot SECONDS)"
            )
        shortened += stop > samples
        chosen = piece.channel or recorded_channel or channel
        write_audio(path, recording.read(start, min(stop, samples), chosen), rate)
    return shortened


@contextmanager
def _reading(cut: "Cut", src: Path) -> Iterator[None]:
    """Name a cut whose values are of other types than a manifest's, which lhotse doesn't check."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{src}: cut {getattr(cut, 'id', '')}: not what cuts are ({type(error).__name__}: "
            f"{error}): make the manifest anew"
        ) from error


def _read_cuts(src: Path) -> Iterator["Cut"]:
    try:
        from lhotse import CutSet
    except ImportError:
        raise InputError(f"{src}: Lhotse's cuts need lhotse: pip install lhotse") from None
    try:
        yield from CutSet.from_jsonl_lazy(src)
    except InputError:
        raise
    except Exception as error:  # what gzip, JSON and lhotse's own parser raise
        raise InputError(
            f"{src}: not a manifest of cuts ({type(error).__name__}: {error}): give a cuts.jsonl.gz"
        ) from error


def _commands(cut: "Cut") -> dict[str, str]:
    """Return the commands that a cut's audio comes from, as a ``wav.scp`` has them."""
    sources = getattr(getattr(cut, "recording", None), "sources", ())
    commands = [f"{source.source} |" for source in sources if source.type == "command"]
    return dict.fromkeys([cut.id], "; ".join(commands)) if commands else {}


def _supervisions(
    cut: "Cut", src: Path, channel: int | None, max_overshoot: float
) -> Sequence["SupervisionSegment"]:
    from lhotse import MonoCut, MultiCut, Recording, SupervisionSegment

    if isinstance(cut, Recording | SupervisionSegment):
        raise InputError(
            f"{src}: a manifest of {type(cut).__name__}s, not of cuts: make cuts of recordings and "
            "supervisions: lhotse cut simple -r recordings.jsonl.gz -s supervisions.jsonl.gz "
            "cuts.jsonl.gz"
        )
    if not isinstance(cut, MonoCut | MultiCut):
        raise InputError(
            f"{src}: {type(cut).__name__} {getattr(cut, 'id', '')}: only MonoCut and MultiCut are "
            "read: save the cuts' audio and take cuts of that"
        )
    if isinstance(cut, MultiCut):
        channels = len(cut.channel) if isinstance(cut.channel, list) else 1
        if channel is None:
            raise InputError(
                f"{src}: MultiCut {cut.id}: {channels} channels, one wanted: choose it (--channel "
                "N, 0 for their mean), or take each supervision's own: "
                "cuts.trim_to_supervisions(keep_all_channels=False)"
            )
        if not 0 <= channel <= channels:
            raise InputError(
                f"{src}: MultiCut {cut.id}: no channel {channel}: it has {channels} (0 is their "
                "mean)"
            )
    for source in getattr(cut.recording, "sources", ()) if cut.has_recording else ():
        if source.type not in ("file", "command", "memory"):
            raise InputError(
                f"{src}: cut {cut.id}: audio of type '{source.type}', which is not read: download "
                "it, and name files in the manifest"
            )
    if not cut.supervisions or not cut.has_recording:
        what = "recording" if cut.supervisions else "supervision"
        raise InputError(f"{src}: cut {cut.id}: no {what}: leave it out of the cuts")
    sample = 1 / cut.sampling_rate
    for supervision in cut.supervisions:
        if supervision.start < -sample or supervision.end > (
            cut.duration + max(sample, max_overshoot)
        ):
            raise InputError(
                f"{src}: supervision {supervision.id}: from {supervision.start:g} to "
                f"{supervision.end:g} s of a cut of {cut.duration:g} s: cut it whole, or allow "
                "more (--max_overshoot SECONDS)"
            )
    return cut.supervisions


def _phonemes(text: dict[str, str], lexicon: Lexicon | None, where: Path) -> dict[str, str]:
    if lexicon is None:
        raise InputError(f"{where}: no phonemes, and no lexicon to make them with: give --lexicon")
    return lexicon.transcribe_all(text)


def _utterance_id(utt: str, speaker: str, src: Path) -> str:
    name = utt if utt.startswith(speaker) else f"{speaker}-{utt}"
    if "/" in name or " " in name:
        raise InputError(f"{src}: id {name}: it names a file, so no '/' or space: rename it")
    return name


def _renamed(data: DataDir, names: dict[str, str]) -> DataDir:
    if len(set(names.values())) < len(names):
        raise InputError("two utterances have one id once <speaker>- is put in front: rename them")
    tables = (
        {names[utt]: value for utt, value in table.items()}
        for table in (data.wav, data.spk1, data.text, data.phn, data.utt2spk)
    )
    return DataDir(*tables)


def _report(
    out: Path,
    data: DataDir,
    names: dict[str, str],
    cut_out: int,
    shortened: int,
    lexicon: Lexicon | None,
) -> Prepared:
    notes = []
    if cut_out:
        notes.append(f"{out}: {cut_out} cut out of recordings, as FLAC")
    if shortened:
        notes.append(f"{out}: {shortened} cut at their recording's end, before their own")
    if renamed := sum(utt != name for utt, name in names.items()):
        notes.append(f"{out}: {renamed} renamed, their speaker in front")
    if lexicon:
        notes.append(f"{out}: {lexicon.describe_predicted()}")
    return Prepared({out: Contents.of(data)}, notes=tuple(notes))
