"""Damaged copies of a data directory, to see that what is wrong with a corpus is named.

Each kind of damage has its documented outcome in :data:`KINDS`: the message of what is refused, or
that it is handled. ``python -m posinv.bin.damage_corpus --table`` prints them, for egs/README.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from posinv.augment.draws import generator
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.files import atomic_folder
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError

Stage = Literal["format", "import", "mix"]

LISTS = ("wav.scp", "spk1.scp", "text", "phn", "utt2spk")
_RATE_AT = slice(24, 28)  # bytes of a WAV header
_CHANNELS_AT = slice(22, 24)
_SIZE_AT = slice(40, 44)


@dataclass
class Copy:
    """A copy of a data directory that is being damaged.

    Attributes:
        directory: where its lists are written; ``audio`` in it holds what is damaged.
        tables: its lists, by file name.
        utts: the utterances to damage.
        lines: a list's lines as they are to be written, where they aren't those of ``tables``.
        raw: a list's bytes, likewise; None: no such file.
    """

    directory: Path
    tables: dict[str, dict[str, str]]
    utts: list[str]
    lines: dict[str, list[str]] = field(default_factory=dict)
    raw: dict[str, bytes | None] = field(default_factory=dict)

    def samples(self, utt: str) -> np.ndarray:
        """Return an utterance's samples ``(T,)`` at 16 kHz."""
        return read_audio(self.tables["wav.scp"][utt], SAMPLING_RATE, resample=True)

    def put(self, utt: str, name: str) -> Path:
        """Let an utterance's audio be the file ``audio/<name>``, and return its path."""
        path = self.directory / "audio" / name
        self._name(utt, path)
        return path

    def write(
        self, utt: str, x: np.ndarray, subtype: str = "PCM_16", rate: int = SAMPLING_RATE
    ) -> Path:
        """Write samples ``(T,)`` or ``(T, C)`` as WAV, and let them be the utterance's audio."""
        path = self.put(utt, f"{utt.replace('/', '%')}.wav")
        soundfile.write(path, x, rate, subtype)
        return path

    def _name(self, utt: str, entry: object) -> None:
        same = self.tables.get("spk1.scp", {}).get(utt) == self.tables["wav.scp"][utt]
        self.tables["wav.scp"][utt] = str(entry)
        if same:
            self.tables["spk1.scp"][utt] = str(entry)

    def text_of(self, name: str) -> list[str]:
        """Return a list's lines, to be changed and put into ``lines``."""
        return [f"{utt} {value}" for utt, value in sorted(self.tables[name].items())]

    def save(self) -> None:
        """Write the lists."""
        for name, table in self.tables.items():
            if name in self.raw:
                if (content := self.raw[name]) is not None:
                    (self.directory / name).write_bytes(content)
            elif name in self.lines:
                (self.directory / name).write_text(
                    "".join(f"{line}\n" for line in self.lines[name]), encoding="utf-8"
                )
            else:
                write_table(self.directory / name, table)


@dataclass(frozen=True)
class Kind:
    """A kind of damage.

    Attributes:
        damage: does it to a copy.
        what: the damage in words.
        refused: the part of the message, a regular expression, that says what is wrong; empty: it
            is handled.
        outcome: of what is handled, how; of what is refused, the message in short.
        stage: where it is refused first: ``format``, by ``validate_data`` and ``format_data``;
            ``import``, by ``import_data``; ``mix``, by ``mix_noise``.
        of_utterance: whether ``--on_bad_utt skip`` leaves the utterance out; it can't where a list
            is damaged as a whole.
        heavy: takes tens of seconds.
    """

    damage: Callable[[Copy], None]
    what: str
    refused: str
    outcome: str
    stage: Stage = "format"
    of_utterance: bool = True
    heavy: bool = False


def damage_corpus(
    src: Path | str, out: Path | str, kind: str, utterances: int = 1, seed: int = 0
) -> list[str]:
    """Write a damaged copy of a data directory.

    The lists are copied; audio that isn't damaged stays where it is. The source is only read.

    Args:
        src: the data directory, with ``wav.scp``, ``text``, ``utt2spk``, perhaps ``spk1.scp`` and
            ``phn``.
        out: the copy, which must be new.
        kind: of :data:`KINDS`.
        utterances: how many are damaged.
        seed: of the draw of these.

    Returns:
        The utterances that are damaged.

    Raises:
        InputError: an unknown kind; a source that can't be read or has fewer utterances.
    """
    if kind not in KINDS:
        raise InputError(f"--kinds: there is no {kind}; there are: {' '.join(KINDS)}")
    src, out = Path(src), Path(out).resolve()
    tables = {name: read_table(src / name) for name in LISTS if (src / name).exists()}
    if not {"wav.scp", "text", "utt2spk"} <= tables.keys():
        raise InputError(f"{src}: needs wav.scp, text and utt2spk: name a data directory")
    for name in {"wav.scp", "spk1.scp"} & tables.keys():
        for utt, entry in tables[name].items():
            if Path(entry).exists():
                tables[name][utt] = str(Path(entry).resolve())
    known = sorted(set.intersection(*(set(table) for table in tables.values())))
    if not 1 <= utterances <= len(known):
        raise InputError(f"--utterances {utterances}: from 1 to the {len(known)} of {src}")
    chosen = generator(kind, seed).choice(len(known), utterances, replace=False)
    utts = [known[i] for i in sorted(chosen)]
    with atomic_folder(out) as fresh:
        (fresh / "audio").mkdir()
        copy = Copy(fresh, tables, utts)
        KINDS[kind].damage(copy)
        for table in tables.values():
            for utt, entry in table.items():
                table[utt] = entry.replace(str(fresh), str(out))
        copy.save()
    return utts


def kinds_table() -> str:
    """Return the kinds of damage and their outcomes as a Markdown table."""
    rows = ["| kind | damage | outcome | `--on_bad_utt skip` |", "| --- | --- | --- | --- |"]
    for name, kind in KINDS.items():
        skip = "kept"
        if kind.refused:
            skip = "left out, listed" if kind.of_utterance else "refused"
            skip = skip if kind.stage != "import" else "refused"
        outcome = f"refused: {kind.outcome}" if kind.refused else kind.outcome
        rows.append(f"| `{name}` | {kind.what} | {outcome} | {skip} |")
    return "\n".join(rows) + "\n"


# ------------------------------------------------------------------------------ audio


def _each(change: Callable[[Copy, str], object]) -> Callable[[Copy], None]:
    def damage(copy: Copy) -> None:
        for utt in copy.utts:
            change(copy, utt)

    return damage


def _of_samples(
    change: Callable[[np.ndarray], np.ndarray], subtype: str = "PCM_16", rate: int = SAMPLING_RATE
) -> Callable[[Copy], None]:
    return _each(lambda copy, utt: copy.write(utt, change(copy.samples(utt)), subtype, rate))


def _of_bytes(
    change: Callable[[bytearray], bytes | bytearray], flac: bool = False
) -> Callable[[Copy], None]:
    def damage(copy: Copy, utt: str) -> None:
        path = copy.write(utt, copy.samples(utt))
        if flac:
            x, rate = soundfile.read(path)
            path.unlink()
            path = copy.put(utt, f"{utt}.flac")
            soundfile.write(path, x, rate)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return _each(damage)


def _header(where: slice, value: int) -> Callable[[bytearray], bytearray]:
    def change(content: bytearray) -> bytearray:
        content[where] = value.to_bytes(where.stop - where.start, "little")
        return content

    return change


def _flac_length(content: bytearray) -> bytearray:
    # The last 36 bits of STREAMINFO's bytes 10 to 18, which begin 8 bytes into the file.
    field_ = int.from_bytes(content[18:26], "big")
    content[18:26] = (field_ | ((1 << 36) - 1)).to_bytes(8, "big")
    return content


def _with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x[len(x) // 2] = value
        return x

    return change


def _link(target: str) -> Callable[[Copy], None]:
    return _each(lambda copy, utt: copy.put(utt, f"{utt}.wav").symlink_to(target.format(utt)))


def _unreadable(copy: Copy, utt: str) -> None:
    copy.write(utt, copy.samples(utt)).chmod(0)


# ------------------------------------------------------------------------------ lists


def _rename(new_id: Callable[[str, str], str]) -> Callable[[Copy], None]:
    """Give utterances another id, a function of the old one and its speaker's, in all lists."""

    def damage(copy: Copy) -> None:
        for utt in copy.utts:
            other = new_id(utt, copy.tables["utt2spk"][utt])
            for name, table in copy.tables.items():
                table[other] = table.pop(utt)
                copy.lines[name] = sorted(copy.text_of(name))

    return damage


def _edit(name: str, change: Callable[[list[str], list[int]], object]) -> Callable[[Copy], None]:
    """Change the lines of a list, given the indices of the chosen utterances'."""

    def damage(copy: Copy) -> None:
        table = copy.tables.get(name)
        if table is None:
            raise InputError(f"this kind damages {name}, which isn't there: choose another")
        lines = copy.text_of(name)
        places = [i for i, utt in enumerate(sorted(table)) if utt in copy.utts]
        change(lines, places)
        copy.lines[name] = lines

    return damage


def _drop(lines: list[str], places: list[int]) -> None:
    for i in reversed(places):
        del lines[i]


def _empty(lines: list[str], places: list[int]) -> None:
    for i in places:
        lines[i] = lines[i].partition(" ")[0]


def _twice(lines: list[str], places: list[int]) -> None:
    for i in reversed(places):
        lines.insert(i, lines[i])


def _to_the_end(lines: list[str], places: list[int]) -> None:
    first = lines[0]
    lines.remove(first)
    lines.append(first)


def _append(more: str) -> Callable[[list[str], list[int]], None]:
    def change(lines: list[str], places: list[int]) -> None:
        for i in places:
            lines[i] += more

    return change


def _replace(entry: str) -> Callable[[list[str], list[int]], None]:
    def change(lines: list[str], places: list[int]) -> None:
        for i in places:
            lines[i] = f"{lines[i].partition(' ')[0]} {entry}"

    return change


def _of_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Copy], None]:
    def damage(copy: Copy) -> None:
        copy.raw[name] = change("".join(f"{line}\n" for line in copy.text_of(name)).encode())

    return damage


def _folder(copy: Copy) -> None:
    copy.raw["text"] = None
    (copy.directory / "text").mkdir()


def _reference(copy: Copy, utt: str) -> None:
    path = copy.directory / "audio" / f"{utt}.spk1.wav"
    soundfile.write(path, copy.samples(utt)[:-1], SAMPLING_RATE)
    copy.tables.setdefault("spk1.scp", dict(copy.tables["wav.scp"]))[utt] = str(path)


def _pipe(copy: Copy, utt: str) -> None:
    path = copy.write(utt, copy.samples(utt))
    copy._name(utt, f"cat '{path}' |")


KINDS: dict[str, Kind] = {
    # ---- files that aren't what they say
    "flac_cut": Kind(
        _of_bytes(lambda content: content[: len(content) // 2], flac=True),
        "a FLAC file cut short",
        "not audio that soundfile can read|cut short",
        "not audio that soundfile can read",
    ),
    "wav_cut": Kind(
        _of_bytes(lambda content: content[: len(content) // 2]),
        "a WAV file cut short",
        r"cut short: its header says \d+ bytes",
        "cut short",
    ),
    "wav_size": Kind(
        _of_bytes(_header(_SIZE_AT, 10**8)),
        "a WAV header that says too many samples",
        "cut short: its header says 100000000",
        "cut short",
    ),
    "wav_rate": Kind(
        _of_bytes(_header(_RATE_AT, 2)),
        "a WAV header that says 2 Hz",
        "sampled at 2 Hz, its header says",
        "an impossible sampling rate",
    ),
    "wav_channels": Kind(
        _of_bytes(_header(_CHANNELS_AT, 0)),
        "a WAV header that says no channels",
        "not audio that soundfile can read",
        "not audio that soundfile can read",
    ),
    "flac_length": Kind(
        _of_bytes(_flac_length, flac=True),
        "a FLAC header that says 68,719,476,735 samples",
        r"its header says \d+ samples, which \d+ bytes can't hold",
        "a header that can't be true",
    ),
    "not_audio": Kind(
        _of_bytes(lambda content: b"<html>404 Not Found</html>\n" * 20),
        "a web page under the name of a WAV file",
        "not audio that soundfile can read",
        "not audio that soundfile can read",
    ),
    "zero_bytes": Kind(
        _of_bytes(lambda content: b""), "an empty file", "empty audio file", "empty audio file"
    ),
    "no_samples": Kind(
        _of_samples(lambda x: x[:0]), "a header without samples", "holds no samples", "no samples"
    ),
    # ---- samples
    "nan": Kind(
        _of_samples(_with_value(np.nan), "FLOAT"),
        "a sample that is NaN",
        r"samples beyond \[-1, 1\] or not finite",
        "samples beyond [-1, 1] or not finite",
    ),
    "infinite": Kind(
        _of_samples(_with_value(np.inf), "FLOAT"),
        "an infinite sample",
        r"samples beyond \[-1, 1\] or not finite",
        "samples beyond [-1, 1] or not finite",
    ),
    "over_full_scale": Kind(
        _of_samples(_with_value(1.5), "FLOAT"),
        "a sample of 1.5",
        r"samples beyond \[-1, 1\] or not finite",
        "samples beyond [-1, 1] or not finite",
    ),
    "silence": Kind(
        _of_samples(np.zeros_like),
        "digital silence",
        "silent, so that it has no SNR",
        "silent, where noise is mixed into it; formatted as it is",
        stage="mix",
    ),
    "clipping": Kind(
        _of_samples(lambda x: np.clip(20 * x / max(np.abs(x).max(), 1e-9), -1, 1), "FLOAT"),
        "speech clipped at full scale",
        "",
        "taken as it is",
    ),
    "dc": Kind(
        _of_samples(lambda x: np.clip(0.5 * x + 0.3, -1, 1)),
        "an offset of 0.3",
        "",
        "taken as it is",
    ),
    # ---- length, channels, rate
    "one_sample": Kind(
        _of_samples(lambda x: x[:1]),
        "one sample",
        "1 samples, shorter than one frame",
        "shorter than one frame (25 ms)",
    ),
    "one_hour": Kind(
        _of_samples(lambda x: np.resize(x, 3600 * SAMPLING_RATE)),
        "an hour of speech",
        "",
        "taken as it is",
        heavy=True,
    ),
    "stereo": Kind(
        _of_samples(lambda x: np.stack([x, x], 1)),
        "two channels",
        "2 channels, one wanted",
        "one channel wanted (`--channel`)",
    ),
    "rate_8k": Kind(
        _of_samples(lambda x: x[::2], rate=8000),
        "8 kHz",
        "sampled at 8000 Hz, not 16000 Hz",
        "another rate than 16 kHz (`--resample true` takes it)",
    ),
    "rate_44k1": Kind(
        _of_samples(lambda x: x, rate=44100),
        "44.1 kHz",
        "sampled at 44100 Hz, not 16000 Hz",
        "another rate than 16 kHz (`--resample true` takes it)",
    ),
    "rate_48k": Kind(
        _of_samples(lambda x: x, rate=48000),
        "48 kHz",
        "sampled at 48000 Hz, not 16000 Hz",
        "another rate than 16 kHz (`--resample true` takes it)",
    ),
    "reference_length": Kind(
        _each(_reference),
        "a clean reference one sample shorter",
        r"\d+ samples but \d+ in its clean reference",
        "wav.scp and spk1.scp don't match",
    ),
    # ---- places
    "missing_file": Kind(
        _each(lambda copy, utt: copy.put(utt, f"{utt}.wav")),
        "a file that isn't there",
        "no such audio file",
        "no such audio file",
    ),
    "dangling_link": Kind(
        _link("nowhere.wav"),
        "a symbolic link that leads nowhere",
        "no such audio file",
        "no such audio file",
    ),
    "link_circle": Kind(
        _link("{}.wav"),
        "a symbolic link to itself",
        "no such audio file",
        "no such audio file",
    ),
    "folder": Kind(
        _each(lambda copy, utt: copy.put(utt, f"{utt}.wav").mkdir()),
        "a folder in a file's place",
        "no such audio file",
        "no such audio file",
    ),
    "long_path": Kind(
        _edit("wav.scp", _replace("/" + "x" * 300 + ".wav")),
        "a file name of 300 letters",
        "File name too long",
        "file name too long",
    ),
    "unreadable": Kind(
        _each(_unreadable),
        "a file without permission to read it",
        "may not be read: change its permissions",
        "may not be read",
    ),
    "failing_command": Kind(
        _edit("wav.scp", _replace("cat /no/such/file |")),
        "a command that fails",
        r"exit status 1 \(cat: ",
        "the command's exit status and last line",
    ),
    "command": Kind(
        _each(_pipe),
        "a command in place of a file",
        r"a command, which would be run: '.*cat ",
        "by `import_data`, `posinv-enhance` and `query_search`, unless `--allow_pipes`; run in "
        "`data/`",
        stage="import",
    ),
    # ---- ids
    "id_markup": Kind(
        _rename(lambda utt, speaker: f"{utt}<b>&amp;\"';$(x)`*é"),
        "an id of markup and shell characters",
        "",
        "taken as it is",
    ),
    "id_slash": Kind(
        _rename(lambda utt, speaker: f"{utt}/../x"),
        "an id with a slash",
        r"must begin with its speaker id .* and have no '/'",
        "it names files, so no '/'",
        of_utterance=False,
    ),
    "id_long": Kind(
        _rename(lambda utt, speaker: utt + "x" * 300),
        "an id of more than 300 letters",
        "it names files, so at most 200 bytes",
        "it names files, so at most 200 bytes",
        of_utterance=False,
    ),
    "id_space": Kind(
        _rename(lambda utt, speaker: f"{utt}\N{NO-BREAK SPACE}x"),
        "an id with a no-break space",
        "has a space that isn't ASCII's",
        "a space that isn't ASCII's",
        of_utterance=False,
    ),
    "id_control": Kind(
        _rename(lambda utt, speaker: f"{utt}\x1b[2J"),
        "an id with a terminal's control sequence",
        r"the control character U\+001B",
        "a control character",
        of_utterance=False,
    ),
    "id_speaker": Kind(
        _rename(lambda utt, speaker: f"0{utt}"),
        "an id that doesn't begin with its speaker's",
        "must begin with its speaker id",
        "must begin with its speaker id (`import_data` renames it)",
        of_utterance=False,
    ),
    # ---- lists
    "text_latin1": Kind(
        _of_file("text", lambda content: content[:-1] + b" caf\xe9\n"),
        "a list that isn't UTF-8",
        r"text: line \d+: not UTF-8 text",
        "not UTF-8, with the line",
        of_utterance=False,
    ),
    "text_crlf": Kind(
        _of_file("text", lambda content: content.replace(b"\n", b"\r\n")),
        "lines that end in CR LF",
        "",
        "read as LF",
        of_utterance=False,
    ),
    "text_bom": Kind(
        _of_file("text", lambda content: b"\xef\xbb\xbf" + content),
        "a byte-order mark",
        "",
        "read away",
        of_utterance=False,
    ),
    "text_null": Kind(
        _edit("text", _append("\0")),
        "a null character in a transcript",
        r"the control character U\+0000",
        "a control character",
        of_utterance=False,
    ),
    "text_markup": Kind(
        _edit("text", _append(" <b>x</b>")),
        "markup in a transcript",
        "",
        "taken as it is; tables show none of it",
    ),
    "text_without": Kind(
        _of_file("text", lambda content: None),
        "a list that isn't there",
        "text: no such file",
        "no such file",
        of_utterance=False,
    ),
    "text_empty": Kind(
        _of_file("text", lambda content: b""),
        "an empty list",
        "text: empty",
        "empty",
        of_utterance=False,
    ),
    "text_folder": Kind(
        _folder,
        "a folder in a list's place",
        "text: Is a directory",
        "is a directory",
        of_utterance=False,
    ),
    "entry_missing": Kind(
        _edit("text", _drop),
        "an utterance without a line in `text`",
        "no transcript for utterance",
        "no transcript for the utterance",
    ),
    "audio_missing": Kind(
        _edit("wav.scp", _drop),
        "an utterance without a line in `wav.scp`",
        "wav.scp and .* don't match",
        "wav.scp and the list don't match",
    ),
    "speaker_missing": Kind(
        _edit("utt2spk", _drop),
        "an utterance without a line in `utt2spk`",
        "wav.scp and utt2spk don't match",
        "wav.scp and utt2spk don't match",
    ),
    "transcript_empty": Kind(
        _edit("text", _empty),
        "an empty transcript",
        r"text: line \d+: no transcript",
        "no transcript, with the line",
    ),
    "transcript_long": Kind(
        _edit("text", _append(" a" * 3000)),
        "more words than CTC can align with the audio",
        "CTC can't align it",
        "CTC can't align it",
    ),
    "entry_twice": Kind(
        _edit("wav.scp", _twice),
        "an utterance twice in `wav.scp`",
        r"wav.scp: line \d+: duplicated id",
        "duplicated id",
        of_utterance=False,
    ),
    "unsorted": Kind(
        _edit("wav.scp", _to_the_end),
        "a list that isn't sorted",
        r"wav.scp: line \d+: .* is out of order",
        "out of order, with how to sort it",
        of_utterance=False,
    ),
}
