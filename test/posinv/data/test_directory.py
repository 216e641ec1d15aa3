import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posinv.data.audio import read_audio, write_audio
from posinv.data.directory import DataDir, check_tokens, format_data, validate
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_parallel, map_processes
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError

RATE = 16000
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def data(tmp_path) -> Path:
    """A directory of two utterances, in a path with spaces; b has its own clean reference."""
    folder = tmp_path / "my data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in {"a1": 4000, "b1": 3000, "b1 clean": 3000}.items():
        write_audio(folder / f"{name}.wav", rng.uniform(-0.5, 0.5, size), RATE)
    wav = {"a-1": str(folder / "a1.wav"), "b-1": str(folder / "b1.wav")}
    spk1 = wav | {"b-1": str(folder / "b1 clean.wav")}
    text = {"a-1": "one two", "b-1": "two"}
    phn = {"a-1": "W AH N T UW", "b-1": "T UW"}
    DataDir(wav, spk1, text, phn, {"a-1": "a", "b-1": "b"}).write(folder)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


def command(name: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"posinv.bin.{name}", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )


words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)


@given(st.dictionaries(words, st.lists(words, min_size=1).map(" ".join), min_size=1))
def test_tables_read_back_sorted_by_bytes(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("table") / "text"
    write_table(path, table)
    back = read_table(path)
    assert back == table
    assert list(back) == sorted(table, key=str.encode)


def test_data_dir_reads_back(data, tmp_path):
    lists = DataDir.read(data)
    lists.write(tmp_path / "copy")
    assert DataDir.read(tmp_path / "copy") == lists
    assert lists.spk1["b-1"].endswith("b1 clean.wav")


def test_clean_speech_needs_no_list_of_references(data):
    (data / "spk1.scp").unlink()
    lists = DataDir.read(data)
    assert lists.spk1 == lists.wav
    assert validate(data, RATE) == 7000


def test_valid_data_in_a_path_with_spaces(data):
    assert validate(data, RATE, nj=1) == 7000
    assert validate(data, RATE, nj=2) == 7000


def damage_missing(data):
    (data / "a1.wav").unlink()


def damage_empty(data):
    (data / "a1.wav").write_bytes(b"")


def damage_not_audio(data):
    (data / "a1.wav").write_text("no audio here")


def damage_rate(data):
    write_audio(data / "a1.wav", np.zeros(4000), 8000)


def damage_no_line(data):
    edit(data / "text", "b-1 two\n", "")


def damage_no_words(data):
    edit(data / "text", "b-1 two\n", "b-1\n")


def damage_token(data):
    edit(data / "phn", "T UW", "T QQ")


def damage_word(data):
    edit(data / "text", "one", "uno")


def damage_duplicate(data):
    edit(data / "wav.scp", "b-1 ", "a-1 ")


def damage_order(data):
    edit(data / "wav.scp", "a-1 ", "c-1 ")


def damage_reference_missing(data):
    edit(data / "spk1.scp", "b-1 ", "b-2 ")


def damage_reference_length(data):
    write_audio(data / "b1 clean.wav", np.zeros(2999), RATE)


def damage_short(data):
    write_audio(data / "a1.wav", np.zeros(399), RATE)


def damage_speaker(data):
    edit(data / "utt2spk", "a-1 a", "a-1 x")


def damage_no_list(data):
    (data / "phn").unlink()


def damage_segments(data):
    (data / "segments").write_text("a-1 a 0 1\nb-1 b 0 1\n")


def damage_empty_list(data):
    (data / "phn").write_text("\n")


DAMAGES = {
    damage_missing: r"utterance a-1: .*my data/a1.wav: no such audio file",
    damage_empty: r"utterance a-1: .*a1.wav: empty audio file",
    damage_not_audio: r"utterance a-1: .*a1.wav: not audio",
    damage_rate: r"utterance a-1: .*a1.wav: sampled at 8000 Hz, not 16000 Hz",
    damage_no_line: r"text: no transcript for utterance b-1",
    damage_no_words: r"text: line 2: no transcript for utterance b-1",
    damage_token: r"phn: utterance a-1: unknown phn token 'QQ'",
    damage_word: r"text: utterance a-1: unknown word token 'uno'",
    damage_duplicate: r"wav.scp: line 2: duplicated id a-1",
    damage_order: r"wav.scp: line 2: b-1 is out of order",
    damage_reference_missing: r"wav.scp and spk1.scp don't match: utterance b-1 is in wav.scp",
    damage_reference_length: r"utterance b-1: 3000 samples but 2999 in its clean reference",
    damage_short: r"utterance a-1: .*399 samples, shorter than one frame \(400\)",
    damage_speaker: r"utt2spk: utterance id a-1 must begin with its speaker id \(x\)",
    damage_no_list: r"phn: no such file: .*posinv.bin.import_data .* --lexicon FILE",
    damage_segments: r"segments: not read here: .*posinv.bin.import_data",
    damage_empty_list: r"phn: empty",
}


@pytest.fixture
def token_lists(tmp_path):
    (tmp_path / "phn.txt").write_text("<blank>\nW\nAH\nN\nT\nUW\n")
    (tmp_path / "word.txt").write_text("one\ntwo\n")
    return {"phn": tmp_path / "phn.txt", "word": tmp_path / "word.txt"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_data_is_one_line(data, token_lists, damage):
    assert validate(data, RATE, token_lists) == 7000
    damage(data)
    with pytest.raises(InputError, match=DAMAGES[damage]) as error:
        validate(data, RATE, token_lists)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGES if d not in (damage_token, damage_word)], ids=lambda d: d.__name__
)
def test_bad_data_leaves_no_half_formatted_directory(data, tmp_path, damage):
    format_data(data, tmp_path / "dump" / "x", RATE)
    before = (tmp_path / "dump/x/audio/a-1.flac").read_bytes()
    damage(data)
    with pytest.raises(InputError, match=DAMAGES[damage]):
        format_data(data, tmp_path / "dump" / "x", RATE, nj=2)
    assert [p.name for p in (tmp_path / "dump").iterdir()] == ["x"]
    assert (tmp_path / "dump/x/audio/a-1.flac").read_bytes() == before


def test_commands_exit_with_one_line(data, tmp_path, token_lists):
    options = ["--phn_tokens", token_lists["phn"], "--nj", 1]
    done = command("validate_data", data, *options)
    assert (done.returncode, done.stderr) == (0, "")
    damage_token(data)
    done = command("validate_data", data, *options)
    assert done.returncode == 1
    assert done.stderr.startswith("validate_data: error: ") and done.stderr.count("\n") == 1
    damage_short(data)
    done = command("format_data", "--src", data, "--out", tmp_path / "dump/x")
    assert done.returncode == 1
    assert done.stderr.startswith("format_data: error: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "dump").iterdir())


def test_character_tokens_know_the_space():
    check_tokens({"u": "ab a"}, {"a", "b", "<space>"}, "char", "text")
    with pytest.raises(InputError, match="unknown char token '<space>'"):
        check_tokens({"u": "ab a"}, {"a", "b"}, "char", "text")


def test_transcripts_that_ctc_cannot_align_are_named(data, token_lists):
    """A blank between equal neighbours takes a frame, too: 9 frames are in 3000 samples."""
    for phn in ("T UW T UW T UW T UW T", "T T T T T"):
        edit(data / "phn", "b-1 T UW\n", f"b-1 {phn}\n")
        assert validate(data, RATE, token_lists, nj=2, align={"phn": 1})
        edit(data / "phn", f"b-1 {phn}\n", f"b-1 {phn} UW\n")
        with pytest.raises(
            InputError, match=r"utterance b-1: \d+ phn tokens need 10 frames, its audio has 9: CTC"
        ):
            validate(data, RATE, token_lists, nj=2, align={"phn": 1})
        edit(data / "phn", f"b-1 {phn} UW\n", "b-1 T UW\n")


def test_a_head_that_stacks_frames_has_fewer_of_them(data, token_lists, tmp_path):
    config = tmp_path / "pr.yaml"
    config.write_text("encoder_conf: {stack: 2}\n")
    options = ["--phn_tokens", token_lists["phn"], "--nj", 1, "--align"]
    edit(data / "phn", "b-1 T UW\n", "b-1 T UW T UW T\n")
    assert command("validate_data", data, *options, f"phn={config}").returncode == 0
    edit(data / "phn", "b-1 T UW T UW T\n", "b-1 T UW T UW T UW\n")
    assert command("validate_data", data, *options, "phn").returncode == 0
    failed = command("validate_data", data, *options, f"phn={config}")
    assert failed.returncode == 1
    assert "6 phn tokens need 6 frames, its audio has 5: CTC" in failed.stderr
    failed = command("validate_data", data, *options, "phone")
    assert "--align: phone: must begin with one of word, char, phn" in failed.stderr


def test_byte_order_marks_are_read_away(data, token_lists):
    for name in ("wav.scp", "text", "phn"):
        path = data / name
        path.write_text(path.read_text(), encoding="utf-8-sig")
    for path in token_lists.values():
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert validate(data, RATE, token_lists) == 7000


def test_clean_speech_alone(data, tmp_path):
    format_data(data, tmp_path / "clean", RATE, clean=True)
    made = DataDir.read(tmp_path / "clean")
    assert made.wav == made.spk1
    assert np.array_equal(
        read_audio(made.wav["b-1"], RATE), read_audio(str(data / "b1 clean.wav"), RATE)
    )


def test_digests_know_the_audio_and_its_reference(data, tmp_path):
    def digests():
        format_data(data, tmp_path / "raw", RATE)
        return read_table(tmp_path / "raw" / "utt2digest")

    before = digests()
    assert digests() == before
    for name, utt in (("a1", "a-1"), ("b1 clean", "b-1")):
        path = data / f"{name}.wav"
        write_audio(path, 0.9 * read_audio(str(path), RATE), RATE)
        after = digests()
        assert [utt for utt in before if after[utt] != before[utt]] == [utt]
        before = after


def test_one_frame_is_enough(data):
    write_audio(data / "a1.wav", np.zeros(400), RATE)
    assert validate(data, RATE) == 3400


@pytest.mark.parametrize("nj", [1, 2])
def test_format(data, tmp_path, nj):
    out = tmp_path / "dump set" / "x"
    assert format_data(data, out, RATE, nj=nj) == (7000, 0)
    before, after = DataDir.read(data), DataDir.read(out)
    assert (after.text, after.phn, after.utt2spk) == (before.text, before.phn, before.utt2spk)
    assert read_table(out / "utt2num_samples") == {"a-1": "4000", "b-1": "3000"}
    for utt in before.wav:
        for old, new in ((before.wav, after.wav), (before.spk1, after.spk1)):
            np.testing.assert_array_equal(read_audio(new[utt], RATE), read_audio(old[utt], RATE))
    assert sorted(path.name for path in (out / "audio").iterdir()) == [
        *("a-1.flac", "b-1.flac", "b-1.spk1.flac"),
    ]


def test_format_resamples_on_request_and_scales_a_pair_together(data, tmp_path):
    full_scale = np.where(np.arange(1500) % 8 < 4, 1.0, -1.0)
    write_audio(data / "a1.wav", full_scale, 8000)
    write_audio(data / "b1.wav", full_scale, 8000)
    write_audio(data / "b1 clean.wav", full_scale / 4, 8000)
    with pytest.raises(InputError, match="sampled at 8000 Hz"):
        format_data(data, tmp_path / "x", RATE)
    samples, scaled = format_data(data, tmp_path / "x", RATE, resample=True)
    assert (samples, scaled) == (6000, 2)
    out = DataDir.read(tmp_path / "x")
    mix, clean = (read_audio(table["b-1"], RATE) for table in (out.wav, out.spk1))
    assert np.abs(mix).max() > 0.999
    assert np.abs(mix - 4 * clean).max() <= 4 / 32768


def test_output_never_replaces_its_source_or_a_stranger(data, tmp_path):
    for out in (data, data / "sub", data.parent):
        with pytest.raises(InputError, match="would overwrite the source"):
            format_data(data, out, RATE)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"home: exists already and has no wav\.scp: remove"):
        format_data(data, tmp_path / "home", RATE)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_atomic_folder_replaces_at_the_end_alone(data, tmp_path):
    before = sorted(data.iterdir())
    with pytest.raises(RuntimeError), atomic_folder(data, replaces="wav.scp") as fresh:
        (fresh / "x").touch()
        raise RuntimeError
    assert sorted(data.iterdir()) == before
    with atomic_folder(data, replaces="wav.scp") as fresh:
        (fresh / "x").touch()
    assert [path.name for path in data.iterdir()] == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


@pytest.mark.parametrize("nj", [1, 2, 3])
def test_map_parallel_keeps_order_and_raises(nj):
    assert list(map_parallel(lambda x: x * x, range(50), nj)) == [x * x for x in range(50)]
    assert list(map_parallel(abs, [], nj)) == []

    def refuse(x):
        raise InputError(f"bad {x}")

    with pytest.raises(InputError, match="bad 0"):
        list(map_parallel(refuse, range(3), nj))


def test_map_parallel_goes_on_beside_a_long_job(tmp_path):
    """The first job waits for the last one."""

    def work(x):
        if x == 59:
            (tmp_path / "last").touch()
        deadline = time.monotonic() + 60
        while x == 0 and not (tmp_path / "last").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return x

    assert list(map_parallel(work, range(60), 2)) == list(range(60))


def test_map_parallel_has_no_threads():
    """A forked process can deadlock on a lock that another thread held at the fork."""
    before = threading.active_count()
    for _ in map_parallel(abs, range(60), 2):
        assert threading.active_count() == before


def test_map_parallel_says_where_an_error_was():
    def fail(x):
        return [x][x]

    with pytest.raises(IndexError) as caught:
        list(map_parallel(fail, range(9), 2))
    assert "return [x][x]" in caught.value.__notes__[0]
    # What can't be sent is an error like another.
    with pytest.raises((AttributeError, pickle.PicklingError)):
        list(map_parallel(lambda x: lambda: x, range(9), 2))


def test_map_parallel_says_that_a_process_was_killed():
    """Such as for memory; it must not wait for ever."""

    def die(x):
        if x == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    for mapped in (map_parallel, map_processes):
        with pytest.raises(InputError, match=r"one of --nj 2 processes was killed"):
            list(mapped(die, range(60), 2))
    with pytest.raises(InputError, match=r"one of --nj 1 processes was killed"):
        list(map_processes(die, [7], 1))


@pytest.mark.parametrize("nj", [1, 3])
def test_map_processes(nj):
    """Results in order, each job in a process of its own; jobs may be endless."""
    taken = count()
    results = map_processes(lambda x: (x, os.getpid()), taken, nj)
    first = list(islice(results, 20))
    results.close()
    assert [x for x, _ in first] == list(range(20))
    assert len({pid for _, pid in first} | {os.getpid()}) == 21
    assert next(taken) <= 20 + nj
    assert list(map_processes(abs, [], nj)) == []

    def refuse(x):
        raise InputError(f"bad {x}")

    with pytest.raises(InputError, match="bad 0"):
        list(map_processes(refuse, range(3), nj))


def test_map_processes_leaves_no_process():
    """Where its caller stops early, however little a process has done so far."""

    def work(x):
        if x:
            time.sleep(60)

    def children():
        return subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True).stdout

    before = children()
    for _ in range(20):
        for _ in map_processes(work, range(3), 3):
            break
        assert children() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_map_parallel_leaves_no_process(tmp_path, number):
    """However its own process ends."""
    script = """
import os, sys, time
from posinv.bin.cli import run
from posinv.data.parallel import map_parallel

def work(_):
    os.write(1, b"%d\\n" % os.getpid())  # print writes the end of the line apart
    time.sleep(60)

run(lambda: list(map_parallel(work, range(2), 2)))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = [process.stdout.readline().strip() for _ in range(2)]
    process.send_signal(number)
    process.wait(20)
    process.stdout.close()
    for worker in workers:
        stat = Path("/proc", worker, "stat")
        deadline = time.monotonic() + 10
        while stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_map_parallel_needs_a_process():
    for mapped in (map_parallel, map_processes):
        with pytest.raises(InputError, match="--nj 0"):
            list(mapped(abs, [1], 0))


def test_read_table_lets_values_be_empty_when_asked(tmp_path):
    path = tmp_path / "hyp"
    path.write_text("u1 a  b\nu2\nu3 \n")
    assert read_table(path, allow_empty=True) == {"u1": "a  b", "u2": "", "u3": ""}
    with pytest.raises(InputError, match="line 2: nothing after u2"):
        read_table(path)
