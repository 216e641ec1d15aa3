import shutil
from collections import Counter

import numpy as np
import pytest
import soxr

from posinv.augment.draws import generator
from posinv.corpora.fsdd import (
    PHONEMES,
    WORDS,
    find_recordings,
    prepare,
    split_recordings,
)
from posinv.data.audio import read_audio, write_audio
from posinv.data.directory import DataDir, validate
from posinv.errors import InputError


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """Two made-up speakers, five recordings a digit; every recording's level is its own."""
    folder = tmp_path_factory.mktemp("fsdd") / "the recordings"
    folder.mkdir()
    for speaker in ("ann", "bob"):
        for digit in range(10):
            for index in range(5):
                x = 0.3 * generator(speaker, digit, index).standard_normal(1600)
                name = f"{digit}_{speaker}_{index}.wav"
                write_audio(folder / name, np.clip(x, -1, 1), 8000)
    return folder


def snapshot(directory):
    return {
        path.relative_to(directory): path.read_bytes().replace(bytes(directory), b"")
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_speakers_are_read_off_the_names(recordings):
    found = find_recordings(recordings)
    assert list(found) == ["ann", "bob"]
    assert [path.name for path in found["bob"][7]] == [f"7_bob_{i}.wav" for i in range(5)]


def test_splits_share_no_recording_and_lose_none(recordings):
    splits = split_recordings(find_recordings(recordings), 0)
    used = [path for speakers in splits.values() for paths in speakers.values() for path in paths]
    assert sorted(used) == sorted(recordings.iterdir())
    assert all(len(speakers) == 2 for speakers in splits.values())
    for speakers in splits.values():
        for paths in speakers.values():
            assert {path.name[0] for path in paths} == set("0123456789")
    assert split_recordings(find_recordings(recordings), 1) != splits


def test_joined_digits(recordings, tmp_path):
    wanted = {"minutes": 0.5, "dev_minutes": 0.1, "test_minutes": 0.2}
    prepared = prepare(recordings, tmp_path / "data", **wanted)
    minutes = [made.minutes for made in prepared.directories.values()]
    names = ["train", "dev", "test", "test_queries"]
    assert [path.name for path in prepared.directories] == names
    assert minutes[0] >= 0.5 and minutes[1] >= 0.1 and minutes[2] >= 0.2
    splits = split_recordings(find_recordings(recordings), 0)
    for split, speakers in splits.items():
        folder = tmp_path / "data" / split
        assert validate(folder, 16000) / 16000 / 60 == pytest.approx(
            prepared.directories[folder].minutes
        )
        data = DataDir.read(folder)
        assert data.wav == data.spk1
        counts = Counter()
        for utt, entry in data.wav.items():
            speaker, _, digits = utt.split("-")
            assert data.utt2spk[utt] == speaker and 3 <= len(digits) <= 6
            assert data.text[utt] == " ".join(WORDS[int(d)] for d in digits)
            assert data.phn[utt] == " ".join(PHONEMES[int(d)] for d in digits)
            counts.update(identify(read_audio(entry, 16000), digits, speakers[speaker]))
        if split == "test":
            assert set(counts) == {path for paths in speakers.values() for path in paths}


def test_queries_are_single_digits_that_the_test_set_does_not_have(recordings, tmp_path):
    prepare(recordings, tmp_path, minutes=0.2, dev_minutes=0.1, test_minutes=0.1)
    splits = split_recordings(find_recordings(recordings), 0)
    validate(tmp_path / "test_queries", 16000)
    queries = DataDir.read(tmp_path / "test_queries")
    assert len(queries.text) == 20
    for utt, word in queries.text.items():
        speaker, _, digit = utt.split("-")
        assert (queries.utt2spk[utt], word) == (speaker, WORDS[int(digit)])
        assert queries.phn[utt] == PHONEMES[int(digit)]
        x = read_audio(queries.wav[utt], 16000)
        [path] = identify(x, digit, splits["dev"][speaker])
        assert path not in splits["test"][speaker]


def identify(x, digits, paths):
    """Find which recordings an utterance joins; fails where one is not of these paths."""
    known = {path: soxr.resample(read_audio(str(path), 8000), 8000, 16000) for path in paths}
    position = 0
    for number, digit in enumerate(digits):
        if number:
            pause = np.flatnonzero(x[position:])[0]
            assert 0.05 * 16000 - 1 <= pause <= 0.25 * 16000 + 1
            position += pause
        matches = [
            (path, recording)
            for path, recording in known.items()
            if path.name[0] == digit and alike(x[position : position + 3200], recording)
        ]
        assert len(matches) == 1
        yield matches[0][0]
        position += len(matches[0][1])
    assert position == len(x)


def alike(a, b):
    return len(a) == len(b) and np.corrcoef(a, b)[0, 1] > 0.999


def test_two_runs_give_identical_bytes(recordings, tmp_path):
    short = {"minutes": 0.2, "dev_minutes": 0.1, "test_minutes": 0.1}
    prepare(recordings, tmp_path / "a", **short, nj=1)
    prepare(recordings, tmp_path / "b", **short, nj=2)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    prepare(recordings, tmp_path / "c", **short, seed=1)
    assert snapshot(tmp_path / "c").keys() != snapshot(tmp_path / "a").keys()


@pytest.mark.parametrize("name", ["11_ann_0.wav", "1_ann.wav", "one_ann_1.wav", "1_a_n_1.wav"])
def test_malformed_names(recordings, tmp_path, name):
    folder = shutil.copytree(recordings, tmp_path / "copy")
    shutil.copy(folder / "1_ann_0.wav", folder / name)
    with pytest.raises(InputError, match=rf"{name}: not named {{digit}}_{{speaker}}_{{index}}"):
        prepare(folder, tmp_path / "data")


def test_bad_recordings(recordings, tmp_path):
    with pytest.raises(InputError, match="no recordings there: set FSDD"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
    with pytest.raises(InputError, match="minutes of dev: 0"):
        prepare(recordings, tmp_path / "data", dev_minutes=0)
    folder = shutil.copytree(recordings, tmp_path / "copy")
    shutil.copy(folder / "1_ann_0.wav", folder / "1_ann_00.wav")
    with pytest.raises(InputError, match="the same recording as"):
        prepare(folder, tmp_path / "data")
    (folder / "1_ann_00.wav").unlink()
    (folder / "3_bob_2.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"3_bob_2.wav: empty audio file"):
        prepare(folder, tmp_path / "data", minutes=1, dev_minutes=0.3, test_minutes=0.3)
    for index in (2, 3, 4):
        (folder / f"3_bob_{index}.wav").unlink()
    with pytest.raises(InputError, match="2 recordings of digit 3 by bob: at least 3"):
        prepare(folder, tmp_path / "data")
    assert not list(tmp_path.glob("data/*"))


def test_the_real_recordings(shared_data, tmp_path):
    wanted = {"minutes": 1.0, "dev_minutes": 0.5, "test_minutes": 0.5}
    prepared = prepare(shared_data / "fsdd" / "recordings", tmp_path, **wanted, nj=2)
    train = prepared.directories[tmp_path / "train"]
    assert train.minutes >= 1 and train.speakers == 5
    data = DataDir.read(tmp_path / "train")
    assert set(data.utt2spk.values()) == {"george", "jackson", "lucas", "nicolas", "yweweler"}
    assert validate(tmp_path / "train", 16000, nj=2) / 16000 / 60 == pytest.approx(train.minutes)
