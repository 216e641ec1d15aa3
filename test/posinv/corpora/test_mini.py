import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from posinv.augment.draws import generator
from posinv.corpora import mini
from posinv.corpora.mini import SPLITS, VOICES, prepare, sentence, split_of, to_arpabet
from posinv.data.audio import read_audio
from posinv.data.directory import DataDir, validate
from posinv.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[3]


def snapshot(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes().replace(bytes(directory), b"")
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "some data"
    return out, prepare(out, minutes=2.0, dev_minutes=0.3, test_minutes=0.4, nj=2)


def test_sets_are_valid_and_long_enough(corpus):
    out, prepared = corpus
    for split, minutes in zip(SPLITS, (2.0, 0.3, 0.4), strict=True):
        made = prepared.directories[out / split]
        assert minutes <= made.minutes < minutes + 0.1
        assert validate(out / split, 16000) / 16000 / 60 == pytest.approx(made.minutes)
        data = DataDir.read(out / split)
        assert (made.utterances, made.speakers) == (len(data.text), len({*data.utt2spk.values()}))


def test_speakers_and_phrases_are_disjoint(corpus):
    out, _ = corpus
    sets = [DataDir.read(out / split) for split in SPLITS]
    for values in ("utt2spk", "text"):
        kinds = [set(getattr(data, values).values()) for data in sets]
        assert sum(map(len, kinds)) == len(set.union(*kinds))
    assert len(set(sets[0].utt2spk.values())) >= 12
    voices = [voice for split in SPLITS for voice in VOICES[split]]
    assert len({voice.variant for voice in voices}) == len(voices)
    assert len({voice.speaker for voice in voices}) == len(voices)


def test_words_and_phonemes(corpus):
    out, _ = corpus
    phones = set()
    for split in SPLITS:
        data = DataDir.read(out / split)
        for utt, text in data.text.items():
            assert 3 <= len(text.split()) <= 8
            assert text.replace(" ", "").isalpha() and text == text.lower()
            phones |= set(data.phn[utt].split())
            seconds = len(read_audio(data.wav[utt], 16000)) / 16000
            assert 0.03 < seconds / len(data.phn[utt].split()) < 0.25
    assert phones <= {phone for value in mini._ARPABET.values() for phone in value.split()}


def test_queries_are_words_of_the_test_set_spoken_alone(corpus):
    out, prepared = corpus
    assert validate(out / "test_queries", 16000) > 0
    queries, data = (DataDir.read(out / name) for name in ("test_queries", "test"))
    assert len(queries.text) == prepared.directories[out / "test_queries"].utterances > 5
    spoken = [text.split() for text in data.text.values()]
    for utt, word in queries.text.items():
        assert utt == f"{queries.utt2spk[utt]}-query-{word}"
        assert 0 < sum(word in words for words in spoken) < len(spoken)
        assert len(queries.phn[utt].split()) >= 4
        x = read_audio(queries.wav[utt], 16000)
        # No silence before and after.
        assert min(np.abs(x[:80]).max(), np.abs(x[-80:]).max()) > 0.01 * np.abs(x).max()
        assert 0.03 < len(x) / 16000 / len(queries.phn[utt].split()) < 0.25
    assert set(queries.utt2spk.values()) <= set(data.utt2spk.values())


def test_levels(corpus):
    out, _ = corpus
    for entry in DataDir.read(out / "train").wav.values():
        x = read_audio(entry, 16000)
        assert -32 < 10 * np.log10(np.mean(x**2)) < -22
        assert np.abs(x).max() < 0.97


def test_the_grammar_is_closed_and_its_words_are_frequent():
    rng = generator("grammar")
    words = {split: Counter() for split in SPLITS}
    for _ in range(3000):
        text = sentence(rng)
        words[split_of(text)].update(text.split())
    train = words["train"]
    assert 60 <= len(train) <= 100
    assert set(words["test"]) <= set(train) and set(words["dev"]) <= set(train)
    assert min(train.values()) / train.total() * 3000 > 8  # a corpus of 20 minutes has 3000 words


def test_two_runs_give_identical_bytes(corpus, tmp_path):
    # A prefix of the same corpus, in another place, with another number of processes.
    short = {"minutes": 0.3, "dev_minutes": 0.1, "test_minutes": 0.1}
    prepare(tmp_path / "x", **short, nj=1)
    first, second = snapshot(corpus[0]), snapshot(tmp_path / "x")
    audio = [name for name in second if name.endswith(".flac")]
    assert len(audio) >= 8
    assert {name: second[name] for name in audio} == {name: first[name] for name in audio}
    prepare(tmp_path / "y", **short, nj=2)
    assert snapshot(tmp_path / "y") == second
    prepare(tmp_path / "z", **short, seed=1)
    assert snapshot(tmp_path / "z")["train/text"] != second["train/text"]


def test_phonemes_are_mapped():
    assert to_arpabet("p_,U_t D_@2 g_r_'i:_n b_'0_k_s") == "P UH T DH AH G R IY N B AA K S"
    assert to_arpabet("w_,e@_r I_z t_'eI_b_@L") == "W EH R IH Z T EY B AH L"
    assert to_arpabet("d_'0_k_t_3_r- a_t#") == "D AA K T ER AE T"
    assert to_arpabet("D_I2_; '0_f_I_s_:") == "DH IH AA F IH S"
    with pytest.raises(KeyError, match="Q"):
        to_arpabet("Q")


def test_phrases_are_joined(tmp_path):
    short = {"minutes": 0.3, "dev_minutes": 0.05, "test_minutes": 0.05}
    prepare(tmp_path / "one", **short)
    prepare(tmp_path / "three", **short, phrases=3)
    one, three = (DataDir.read(tmp_path / name / "train") for name in ("one", "three"))
    validate(tmp_path / "three" / "train", 16000)

    def in_order(data):  # round after round over the voices
        return sorted(data.text, key=lambda utt: (utt[-4:], utt))

    single = [one.text[utt] for utt in in_order(one)]
    for k, utt in enumerate(in_order(three)[: len(single) // 3]):
        assert three.text[utt] == " ".join(single[3 * k : 3 * k + 3])
    first = in_order(three)[0]
    assert three.phn[first].split()[: len(one.phn[first].split())] == one.phn[first].split()
    seconds = [len(read_audio(entry, 16000)) / 16000 for entry in three.wav.values()]
    assert min(seconds) > 5


@pytest.mark.parametrize(
    "options", [{"minutes": 0}, {"test_minutes": -1}, {"nj": 0}, {"phrases": 0}]
)
def test_bad_options(tmp_path, options):
    with pytest.raises(InputError):
        prepare(tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_command(tmp_path):
    command = [sys.executable, "-m", "posinv.bin.prepare_mini", "--out", tmp_path / "data"]
    options = ["--minutes", "0.1", "--dev_minutes", "0.05", "--test_minutes", "0.05"]
    done = subprocess.run(command + options, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert made == ["dev", "test", "test_queries", "train"]
    done = subprocess.run(
        [*command, "--minutes", "-1"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert done.stderr == "prepare_mini: error: minutes of train: -1.0: from 0 to 1000\n"
