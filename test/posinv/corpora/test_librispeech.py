import shutil
import sys

import numpy as np
import pytest

from posinv.augment.draws import generator
from posinv.bin import prepare_librispeech
from posinv.corpora.lexicon import Lexicon
from posinv.corpora.librispeech import prepare
from posinv.corpora.prepared import Contents
from posinv.data.audio import write_audio
from posinv.data.directory import DataDir, validate
from posinv.errors import InputError

# As in LibriSpeech: a speaker's id may begin another's, numbers may have gaps.
SAID = {
    "103-1240-0000": "CHAPTER ONE",
    "103-1240-0001": "ONE HOUSE'S CHAPTER",
    "103-1241-0003": "HOUSE",
    "1034-121119-0000": "ONE ONE ONE",
    "84-121123-0000": "CHAPTER HOUSE ONE",
}
LEXICON = {
    "CHAPTER": "CH AE1 P T ER0",
    "HOUSE": "HH AW1 S",
    "HOUSE'S": "HH AW1 S IH0 Z",
    "ONE": "W AH1 N",
}


@pytest.fixture
def librispeech(tmp_path):
    """A tree as the archives unpack it, of noise."""
    root = tmp_path / "my corpora" / "LibriSpeech"
    for utt, said in SAID.items():
        speaker, chapter, _ = utt.split("-")
        folder = root / "train-clean-100" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        x = 0.1 * generator(utt).standard_normal(1600)
        write_audio(folder / f"{utt}.flac", np.clip(x, -1, 1), 16000)
        with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as file:
            file.write(f"{utt} {said}\n")
    for name in ("BOOKS", "CHAPTERS", "LICENSE", "README", "SPEAKERS"):
        (root / f"{name}.TXT").write_text("; as in the archives\n")
    return root


def chapter(librispeech):
    return librispeech / "train-clean-100" / "103" / "1240"


def prepare_all(librispeech, out, nj=1, lexicon=LEXICON):
    lexicon = Lexicon(lexicon, g2p=False)
    return prepare(librispeech, out, subset="train-clean-100", lexicon=lexicon, nj=nj)


@pytest.mark.parametrize("nj", [1, 2])
def test_a_data_directory(librispeech, tmp_path, monkeypatch, nj):
    monkeypatch.chdir(tmp_path)
    relative = librispeech.relative_to(tmp_path)
    prepared = prepare_all(relative, tmp_path / "data" / "train", nj)
    assert prepared.directories == {tmp_path / "data" / "train": Contents(5, 3)}
    data = DataDir.read(tmp_path / "data" / "train")
    assert data.text == SAID
    assert data.phn == {
        utt: " ".join(LEXICON[word] for word in said.split()) for utt, said in SAID.items()
    }
    assert data.spk1 == data.wav
    for utt, path in data.wav.items():
        speaker, number, _ = utt.split("-")
        folder = librispeech / "train-clean-100" / speaker / number
        assert path == str(folder / f"{utt}.flac")
        assert data.utt2spk[utt] == speaker
    assert validate(tmp_path / "data" / "train", 16000) == 5 * 1600


def test_the_parent_and_the_subset_are_told_apart(librispeech, tmp_path, monkeypatch):
    out = tmp_path / "data"
    with pytest.raises(
        InputError, match=r"train-clean-100 isn't in it but in .*/LibriSpeech: name"
    ):
        prepare_all(librispeech.parent, out)
    with pytest.raises(
        InputError, match=r"train-clean-100 isn't in it but in .*/LibriSpeech: name"
    ):
        prepare_all(librispeech / "train-clean-100", out)
    with pytest.raises(InputError, match=r"no folder train-clean-100 in it: name the folder Libri"):
        prepare_all(tmp_path, out)
    assert not out.exists()


def test_nothing_there(librispeech, tmp_path):
    shutil.rmtree(librispeech / "train-clean-100")
    (librispeech / "train-clean-100" / "103").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train-clean-100: no <speaker>/<chapter>/\*.flac in it"):
        prepare_all(librispeech, tmp_path / "data")


@pytest.mark.parametrize("nj", [1, 2])
def test_transcripts_and_audio_must_match(librispeech, tmp_path, nj):
    listing = chapter(librispeech) / "103-1240.trans.txt"
    whole = listing.read_text()
    lines = whole.splitlines(keepends=True)

    def refused(message):
        with pytest.raises(InputError, match=message):
            prepare_all(librispeech, tmp_path / "data", nj)
        assert not (tmp_path / "data").exists()

    listing.write_text(lines[0])
    refused(r"103-1240.trans.txt: no transcript of 103-1240-0001 \(1 such\)")
    listing.unlink()
    refused(r"103-1240.trans.txt: no transcript of 103-1240-0000 \(2 such\)")
    listing.write_text(whole + "103-1240-0002 ONE\n")
    refused(r"103-1240.trans.txt: no FLAC file of 103-1240-0002 \(1 such\)")
    listing.write_text(whole + "103-1240-0001 ONE\n")
    refused(r"103-1240.trans.txt: line 3: 103-1240-0001 is there twice")
    listing.write_text(lines[0] + "103-1240-0001 \n")
    refused(r"103-1240.trans.txt: line 2: no words of '103-1240-0001'")
    listing.write_text(whole)
    flac = chapter(librispeech) / "103-1240-0001.flac"
    flac.rename(flac.with_name("103-1241-0001.flac"))
    refused(r"103-1241-0001.flac: not named 103-1240-<number>.flac")


def test_an_unknown_word_is_told_with_its_utterance(librispeech, tmp_path):
    known = {word: said for word, said in LEXICON.items() if word != "HOUSE'S"}
    with pytest.raises(InputError, match=r"utterance 103-1240-0001: 'HOUSE'S' \(1\) isn't in"):
        prepare_all(librispeech, tmp_path / "data", lexicon=known)


def test_the_command(librispeech, tmp_path, monkeypatch, capsys):
    known = {word: said for word, said in LEXICON.items() if word != "HOUSE"}
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("CHAPTER\tCH AE1 P\n")
    second.write_text("".join(f"{word}\t{said}\n" for word, said in known.items()))
    out = tmp_path / "data" / "train_clean_100"
    command = ["prepare_librispeech", "--librispeech", str(librispeech), "--out", str(out)]
    command += ["--lexicon", str(first), str(second), "--subset", "train-clean-100", "--nj", "1"]
    monkeypatch.setattr(sys, "argv", command)
    prepare_librispeech.main()
    data = DataDir.read(out)
    assert data.phn["103-1240-0000"] == "CH AE1 P W AH1 N"
    assert data.phn["103-1241-0003"] == "HH AW1 S"  # predicted
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 5 utterances of 3 speakers",
        f"{out}: 2 words (1 different) aren't in the lexicon and were predicted: HOUSE HH AW1 S",
    ]
