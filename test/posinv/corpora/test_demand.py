import numpy as np
import pytest
import soundfile

from posinv.corpora.demand import SEEN, UNSEEN, prepare
from posinv.data.tables import read_table
from posinv.errors import InputError


@pytest.fixture
def demand(tmp_path):
    """DEMAND's layout, a second of another noise in each environment and channel."""
    top = tmp_path / "DE MAND"
    for seed, name in enumerate((*SEEN, *UNSEEN)):
        (top / name).mkdir(parents=True)
        rate = 48000 if name == "SCAFE" else 16000
        for channel in (1, 2):
            noise = 0.1 * np.random.default_rng(10 * seed + channel).standard_normal(rate)
            soundfile.write(top / name / f"ch{channel:02}.wav", noise, rate)
    return top


def test_split(demand, tmp_path):
    # Design: 12 seen, 6 unseen, nothing in both.
    assert (len(SEEN), len(UNSEEN), len({*SEEN, *UNSEEN})) == (12, 6, 18)
    out = tmp_path / "o ut"
    assert str(prepare(demand, out)).splitlines() == [
        f"{out}/seen: 12 recordings, 0.2 minutes",
        f"{out}/unseen: 6 recordings, 0.1 minutes",
    ]
    for split, names in (("seen", SEEN), ("unseen", UNSEEN)):
        listed = read_table(out / split / "wav.scp")
        assert listed == {name: str(out / split / f"{name}.flac") for name in names}
        for name in names:
            x, rate = soundfile.read(listed[name])
            assert (len(x), rate) == (16000, 16000)
            if name != "SCAFE":
                assert np.array_equal(x, soundfile.read(demand / name / "ch01.wav")[0])


def test_resampled_channel_is_the_same_noise(demand, tmp_path):
    prepare(demand, tmp_path / "out")
    x = soundfile.read(tmp_path / "out/unseen/SCAFE.flac")[0]
    original = soundfile.read(demand / "SCAFE" / "ch01.wav")[0]
    # Below 7 kHz, the spectrum of the 48 kHz recording.
    spectrum, wanted = np.fft.rfft(x)[:7000], np.fft.rfft(original)[:7000] / 3
    assert np.linalg.norm(spectrum - wanted) < 0.01 * np.linalg.norm(wanted)


def test_overshoot_is_scaled_down(demand, tmp_path):
    square = np.sign(np.sin(2 * np.pi * 440 * np.arange(48000) / 48000 + 0.1))
    soundfile.write(demand / "SCAFE" / "ch01.wav", square * 0.999, 48000)
    prepare(demand, tmp_path / "out")
    x = soundfile.read(tmp_path / "out/unseen/SCAFE.flac")[0]
    assert np.abs(x).max() > 0.99


def test_what_is_missing_is_named_and_nothing_is_written(demand, tmp_path):
    (demand / "TBUS" / "ch01.wav").unlink()
    (demand / "SCAFE" / "ch01.wav").unlink()
    with pytest.raises(InputError, match=r"no ch01\.wav of TBUS SCAFE: .*TBUS/ch01\.wav"):
        prepare(demand, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_one_stays_when_a_file_is_bad(demand, tmp_path):
    prepare(demand, tmp_path / "out")
    (demand / "DKITCHEN" / "ch01.wav").write_text("no audio" * 100)
    with pytest.raises(InputError, match="DKITCHEN"):
        prepare(demand, tmp_path / "out")
    assert (tmp_path / "out/seen/DKITCHEN.flac").exists()
