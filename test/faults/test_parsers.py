"""Parsers of what users write: the right answer or an InputError, whatever the bytes."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from posinv.bin.recipe_options import read_options
from posinv.corpora.imported import _read_channels, _read_segments, import_cuts
from posinv.corpora.lexicon import Lexicon
from posinv.data.audio import open_recording
from posinv.data.directory import DataDir
from posinv.data.files import read_yaml
from posinv.data.tables import read_table, read_token_list
from posinv.errors import InputError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "text"


def outcome(parse, *args):
    """The parser's answer; None for an InputError, which must be one line that names the file."""
    try:
        return parse(*args)
    except InputError as error:
        message = " ".join(str(error).split())  # as the commands print it
        assert str(args[0]) in message and len(message) < 3000
        return None


# A list's parts, with what goes wrong in them.
IDS = st.text(st.sampled_from("aZ0-_.é文"), min_size=1, max_size=4)
WORDS = st.text(st.sampled_from("abé文'<>&|#()0"), min_size=1, max_size=5)
ODD = st.sampled_from(["\0", "\x1b", "\r", "\x85", "\u2028", "\u00a0", "\ufeff", "\t", "  ", "\n"])
LINE = st.one_of(
    st.builds(lambda i, w: f"{i} {' '.join(w)}", IDS, st.lists(WORDS, min_size=1, max_size=3)),
    st.builds(lambda i, sep, w: f"{i}{sep}{w}", IDS, st.sampled_from([" ", "\t", "  "]), WORDS),
    IDS,
    st.builds(lambda a, o, b: a + o + b, IDS, ODD, WORDS),
    st.just(""),
)
TEXT = st.lists(LINE, max_size=6).map("\n".join)
BYTES = st.one_of(
    st.binary(max_size=60),
    TEXT.map(str.encode),
    st.lists(IDS.map(lambda i: f"{i} x"), max_size=6, unique=True).map(
        lambda lines: ("\n".join(sorted(lines)) + "\n").encode()
    ),
)


def table_model(content: bytes) -> dict[str, str] | None:
    """An independent reader of tables: character by character, no regular expression."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if text.endswith("\n"):
        text = text[:-1]
    table, last = {}, None
    for line in text.split("\n"):
        key, value, rest = "", "", False
        for character in line:
            if character != "\t" and (ord(character) < 32 or 127 <= ord(character) < 160):
                return None
            if character in "\u2028\u2029":
                return None
            if rest:
                value += character
            elif character in " \t":
                rest = True
            else:
                key += character
        if not key or not value.strip() or any(c.isspace() for c in key):
            return None
        if last is not None and not last.encode() < key.encode():
            return None
        table[key] = value.replace("\t", " ").strip()
        last = key
    return table


@given(BYTES)
@example(b"a x\r\nb y\r\n")
@example(b"\xef\xbb\xbfa x\n")
@example("a\u00a0 x".encode())
@example("\U0001f600 x\n\uffff y".encode())
def test_tables(file, content):
    file.write_bytes(content)
    assert outcome(read_table, file) == table_model(content)


@given(BYTES)
def test_tables_whose_values_may_be_empty(file, content):
    file.write_bytes(content)
    table = outcome(read_table, file, True)
    whole = table_model(content)
    assert whole is None or table == whole


NUMBERS = st.one_of(
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(["-1", "0", "1e308", "1e-400", "nan", "inf", "-inf", "0x1", "1_0", "٣", "1,5"]),
)


@given(st.lists(st.tuples(WORDS, NUMBERS, NUMBERS, st.one_of(st.just(""), NUMBERS)), max_size=3))
@example([("r", "1e308", "1.7e308", "")])
@example([("r", "0", "1", "0")])
@example([("r", "0", "1", "-1")])
@example([("r", "1e308", "-1", "")])
def test_segments(file, rows):
    lines = [f"u{i} {' '.join(row)}\n" for i, row in enumerate(rows)]
    file.write_text("".join(lines))
    pieces = outcome(_read_segments, file)
    if pieces is None:
        return
    assert list(pieces) == [f"u{i}" for i in range(len(rows))]
    for piece, (recording, start, end, channel) in zip(pieces.values(), rows, strict=True):
        assert piece.recording == recording
        assert piece.start == float(start) and math.isfinite(piece.start)
        assert piece.end == (math.inf if float(end) < 0 else float(end))
        assert 0 <= piece.start < piece.end
        assert piece.channel == (int(channel) + 1 if channel else None)
        assert not channel or piece.channel >= 1
        samples = round(piece.start * 16000)  # what is done with it next
        assert samples >= 0


@given(st.lists(st.one_of(WORDS, NUMBERS, st.sampled_from("ABZab1209")), max_size=4))
@example(["0"])
@example(["²"])
def test_channels(file, names):
    file.write_text("".join(f"r{i} file {name}\n" for i, name in enumerate(names)))
    channels = outcome(_read_channels, file)
    if channels is not None:
        for name, channel in zip(names, channels.values(), strict=True):
            letters = " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            assert channel == (int(name) if name.isdigit() else letters.index(name)) >= 1


PHONES = st.sampled_from(["AH0", "T", "0.5", "1.0", ".3", "1e-3", "5", "é", "(2)"])
ENTRY = st.tuples(
    st.one_of(WORDS, st.sampled_from(["A", "a", "A(2)", ";;;x", "#"])),
    st.lists(PHONES, max_size=4),
    st.sampled_from(["", " # note", "\t", "\r"]),
)


def lexicon_model(entries) -> dict[str, list[str]] | None:
    words = {}
    for word, phones, _ in entries:
        if word.startswith(";;;"):
            continue
        phones = list(phones)
        while phones and "." in phones[0] and phones[0].replace(".", "").isdigit():
            phones.pop(0)
        if not phones:
            return None
        base = word
        if word.endswith(")") and "(" in word[1:]:
            head, _, number = word[:-1].rpartition("(")
            if head and number.isdigit():
                base = head
        words.setdefault(base.upper(), phones)
    return words or None


@given(st.lists(ENTRY, max_size=5))
def test_lexicons(file, entries):
    lines = [f"{word} {' '.join(phones)}{end}\n" for word, phones, end in entries]
    file.write_text("".join(lines), newline="")
    lexicon = outcome(lambda path: Lexicon.read(path, g2p=False), file)
    expected = lexicon_model(entries)
    if expected is None:
        assert lexicon is None
    else:
        assert {word: lexicon.phonemes(word) for word in expected} == expected
        assert len(lexicon) == len(expected)


@given(BYTES)
def test_lexicons_of_any_bytes(file, content):
    file.write_bytes(content)
    outcome(lambda path: Lexicon.read(path, g2p=False), file)
    outcome(read_token_list, file)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates()
)
YAML = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def shell_model(value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(shell_model(item) for item in value)
    if isinstance(value, dict):
        raise ValueError
    return "" if value is None else str(value)


@given(st.dictionaries(st.text(min_size=1, max_size=4), YAML, max_size=4) | YAML)
def test_options_in_yaml(file, value):
    file.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
    options = outcome(read_options, file)
    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        if not isinstance(value, dict):
            raise ValueError
        expected = {str(name): shell_model(item) for name, item in value.items()}
        if any("\0" in text for pair in expected.items() for text in pair):
            raise ValueError
    except ValueError:
        expected = None
    assert options == expected


@given(
    st.one_of(
        st.text(st.sampled_from("ab: -[]{}&*!#|>'\"\n%@`,?0"), max_size=40).map(str.encode),
        st.binary(max_size=30),
    )
)
@example(b"a: 2026-02-30")
@example(b"a: " + b"9" * 5000)
@example(b"&a [*a]")
@example(b"a: &a [*a]")
@example(b"[" * 3000)
@example(b"a: !!python/object/apply:os.system [touch pwned]")
@example(b"? [a]\n: b")
@example(b"a: !!binary x")
@example(b"a: !!timestamp x")
@example(b"a: !!int x")
@example(b"a: .inf")
@example(b"<<: [1]")
@example(b"a: !!set {b}")
@example(b"a: 1:99999999999999999999999:1.5")
def test_any_yaml(file, content):
    file.write_bytes(content)
    outcome(read_options, file)
    outcome(lambda path: read_yaml(path, "--option"), file)


def test_aliases_that_double_are_refused(file):
    """Seven levels of ten: 10^7 values in 300 bytes, as in the attack called billion laughs."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 7)]
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than 100000 values"):
        read_options(file)


@given(
    st.text(max_size=12) | st.binary(max_size=8).map(lambda b: b.decode("utf-8", "surrogateescape"))
)
@example("x" * 5000)
@example("\0")
@example("\0 |")
@example("a:1")
@example("/:1")
@example("/dev:0")
@example(".")
def test_entries(entry):
    if entry.rstrip().endswith("|"):
        entry = entry.rstrip("| ")  # a command of random letters is not run
    try:
        open_recording(entry)
    except InputError as error:
        assert len(" ".join(str(error).split())) < 6000


@given(st.lists(BYTES, min_size=4, max_size=4))
def test_directories(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("data")
    for name, content in zip(("wav.scp", "text", "phn", "utt2spk"), contents, strict=True):
        (folder / name).write_bytes(content)
    for skipped in (None, {}):
        try:
            data = DataDir.read(folder, skipped)
        except InputError as error:
            assert str(folder) in str(error)
        else:
            assert data.wav.keys() == data.text.keys() == data.phn.keys() == data.utt2spk.keys()
            assert not skipped or not data.wav.keys() & skipped.keys()


CUT = {
    "id": "c", "start": 0.0, "duration": 0.5, "channel": 0, "type": "MonoCut",
    "supervisions": [
        {"id": "s", "recording_id": "r", "start": 0.0, "duration": 0.5, "channel": 0, "text": "A"}
    ],
    "recording": {
        "id": "r", "sampling_rate": 16000, "num_samples": 8000, "duration": 0.5,
        "sources": [{"type": "file", "channels": [0], "source": "none.wav"}],
    },
}  # fmt: skip


def places(value, path=()):
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


@given(st.sampled_from([p for p in places(CUT) if p]), YAML, st.booleans())
@example(("supervisions", 0, "text"), 5, False)
@example(("recording", "sources", 0, "type"), "url", False)
@example(("recording", "sources", 0, "type"), "command", False)
@example(("type",), "PaddingCut", False)
def test_manifests(tmp_path_factory, place, value, remove):
    pytest.importorskip("lhotse")
    folder = tmp_path_factory.mktemp("cuts")
    cut = json.loads(json.dumps(CUT))
    where = cut
    for key in place[:-1]:
        where = where[key]
    if remove:
        del where[place[-1]]
    else:
        where[place[-1]] = value
    manifest = folder / "cuts.jsonl"
    manifest.write_text(json.dumps(cut, default=str) + "\n")
    # the audio is never there, so that each answer is an error
    with pytest.raises(InputError) as error:
        import_cuts(manifest, folder / "out", lexicon=Lexicon({"A": "AH0"}))
    assert str(manifest) in str(error.value) or re.search(
        "isn't in the lexicon|none.wav", str(error.value)
    )
    assert not (folder / "out").exists()
    assert not Path("pwned").exists()
