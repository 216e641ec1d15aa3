import shutil

import numpy as np
import pytest
import soundfile

from posinv.corpora.an4 import draw_dev_speakers, prepare
from posinv.data.audio import read_audio
from posinv.data.directory import DataDir, validate
from posinv.errors import InputError

DICTIONARY = "ONE\tW AH N\nONE(2)\tHH W AH N\nTWO  T UW\nYES  Y EH S\n"


@pytest.fixture
def an4(tmp_path):
    """AN4's layout: ten training speakers of two utterances, two test speakers of one."""
    top = tmp_path / "the corpus" / "an4"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "an4.dic").write_text(DICTIONARY)
    rng = np.random.default_rng(0)
    for split, folder, speakers, form in (
        ("train", "an4_clstk", [f"spk{i}" for i in range(10)], "<s> {} </s> ({})\n"),
        ("test", "an4test_clstk", ["tst0", "tst1"], "{} ({})\n"),
    ):
        lines = ""
        for speaker in speakers:
            (top / "wav" / folder / speaker).mkdir(parents=True)
            for number, words in enumerate(("ONE TWO", "YES")[: 2 if split == "train" else 1]):
                name = f"an{number}-{speaker}-b"
                path = top / "wav" / folder / speaker / f"{name}.sph"
                x = rng.uniform(-0.5, 0.5, 800)
                soundfile.write(path, x, 16000, "PCM_16", format="NIST")
                lines += form.format(words, name)
        (top / "etc" / f"an4_{split}.transcription").write_text(lines)
    return top


def test_directories(an4, tmp_path):
    prepared = prepare(an4, tmp_path / "data", dev_fraction=0.2)
    assert str(prepared).splitlines() == [
        f"{tmp_path}/data/train: 16 utterances of 8 speakers",
        f"{tmp_path}/data/test: 2 utterances of 2 speakers",
        f"{tmp_path}/data/dev: 4 utterances of 2 speakers",
    ]
    sets = {split: DataDir.read(tmp_path / "data" / split) for split in ("train", "dev", "test")}
    speakers = [set(data.utt2spk.values()) for data in sets.values()]
    assert not speakers[0] & speakers[1]
    assert len(set().union(*speakers)) == 12
    test = sets["test"]
    assert test.text == {"tst0-an0-b": "ONE TWO", "tst1-an0-b": "ONE TWO"}
    assert test.phn["tst0-an0-b"] == "W AH N T UW"
    assert test.spk1 == test.wav
    path = an4 / "wav/an4test_clstk/tst0/an0-tst0-b.sph"
    assert np.array_equal(
        read_audio(test.wav["tst0-an0-b"], 16000), soundfile.read(path, dtype="float32")[0]
    )
    assert validate(tmp_path / "data" / "train", 16000) == 16 * 800


def test_speakers_are_drawn_by_the_seed_alone():
    speakers = [f"s{i}" for i in range(30)]
    drawn = draw_dev_speakers(speakers, 0.1, 0)
    assert len(drawn) == 3
    assert draw_dev_speakers(speakers[::-1], 0.1, 0) == drawn
    assert draw_dev_speakers(speakers, 0.1, 1) != drawn
    assert len(draw_dev_speakers(speakers[:3], 0.1, 0)) == 1
    with pytest.raises(InputError, match="1 training speakers, 1 of them"):
        draw_dev_speakers(["s0"], 0.1, 0)
    with pytest.raises(InputError, match="between 0 and 1"):
        draw_dev_speakers(speakers, 1.0, 0)


def test_audio_without_a_transcript_is_told(an4, tmp_path):
    folder = an4 / "wav" / "an4_clstk" / "spk0"
    shutil.copy(folder / "an0-spk0-b.sph", folder / "cen7-spk0-b.sph")
    with (an4 / "etc" / "an4_test.transcription").open("a") as file:
        file.write("<s>  </s> (an5-tst0-b)\n")
    spoken = an4 / "wav/an4test_clstk/tst0/an0-tst0-b.sph"
    shutil.copy(spoken, spoken.with_name("an5-tst0-b.sph"))
    prepared = prepare(an4, tmp_path / "data")
    assert [path.name for path in prepared.left_out] == ["cen7-spk0-b.sph", "an5-tst0-b.sph"]
    last = "left out, without a transcript: 2 files: cen7-spk0-b.sph, an5-tst0-b.sph"
    assert str(prepared).splitlines()[-1] == last


def test_sample(shared_data, tmp_path):
    """The eight utterances of the real corpus, one of which has no transcript."""
    prepared = prepare(shared_data / "an4_sample" / "an4", tmp_path / "data")
    made = {path.name: contents for path, contents in prepared.directories.items()}
    assert {name: one.speakers for name, one in made.items()} == {"train": 2, "test": 2, "dev": 1}
    assert sum(one.utterances for one in made.values()) == 7
    assert [path.name for path in prepared.left_out] == ["cen7-fash-b.sph"]
    test = DataDir.read(tmp_path / "data" / "test")
    assert test.text["mmxg-cen8-b"] == "OCTOBER TWENTY FOUR NINETEEN SEVENTY"
    assert validate(tmp_path / "data" / "test", 16000) == (93824 + 74624 - 2 * 1024) // 2


BAD = {
    "no audio": ("<s> YES </s> (an9-spk0-b)\n", "no an9-spk0-b.sph"),
    "twice": ("<s> YES </s> (an0-spk0-b)\n", "an0-spk0-b is there twice"),
    "no id": ("<s> YES </s>\n", "line 21: must end in an id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_transcripts(an4, tmp_path, case):
    line, message = BAD[case]
    with (an4 / "etc" / "an4_train.transcription").open("a") as file:
        file.write(line)
    with pytest.raises(InputError, match=message):
        prepare(an4, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unknown_word_and_missing_corpus(an4, tmp_path):
    path = an4 / "etc" / "an4_test.transcription"
    path.write_text(path.read_text().replace("ONE TWO (an0-tst1-b)", "ONE SIX (an0-tst1-b)"))
    with pytest.raises(InputError, match=r"utterance tst1-an0-b: 'SIX' \(\d+\) isn't in"):
        prepare(an4, tmp_path / "data")
    with pytest.raises(InputError, match="set AN4 to the folder"):
        prepare(tmp_path / "nowhere", tmp_path / "data")
