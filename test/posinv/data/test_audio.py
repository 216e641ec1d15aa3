import shlex
import subprocess
import sys
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile

from posinv.data.audio import open_recording, read_audio, write_audio
from posinv.errors import InputError

RATE = 16000
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def speech():
    return 0.5 * np.random.default_rng(0).uniform(-1, 1, 1600)


@pytest.mark.parametrize("suffix", [".flac", ".wav"])
def test_written_audio_reads_back_to_half_a_step(tmp_path, speech, suffix):
    path = tmp_path / f"a name with spaces{suffix}"
    write_audio(path, speech, RATE)
    x = read_audio(str(path), RATE)
    assert x.dtype == np.float32 and x.shape == speech.shape
    assert np.abs(x - speech).max() <= 0.5 / 32768 + 1e-7
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_full_scale_and_one_sample(tmp_path):
    write_audio(tmp_path / "x.wav", np.array([-1.0]), RATE)
    assert read_audio(str(tmp_path / "x.wav"), RATE) == [-1]
    write_audio(tmp_path / "x.wav", np.array([1.0]), RATE)
    assert read_audio(str(tmp_path / "x.wav"), RATE) == pytest.approx([32767 / 32768])


@pytest.mark.parametrize("bad", [[1.001], [np.nan], []])
def test_clipping_is_refused_and_nothing_written(tmp_path, bad):
    with pytest.raises(InputError, match=r"x.wav: no samples, or samples beyond \[-1, 1\]"):
        write_audio(tmp_path / "x.wav", np.array(bad), RATE)
    assert not list(tmp_path.iterdir())


def test_unknown_suffix_is_refused(tmp_path, speech):
    with pytest.raises(InputError, match=r"x.mp3: audio is written as .flac or .wav"):
        write_audio(tmp_path / "x.mp3", speech, RATE)


@pytest.mark.parametrize("kind", ["int16", "soundfile"])
def test_kaldiio_archive(tmp_path, speech, kind):
    ark = tmp_path / "with space" / "x.ark"
    ark.parent.mkdir()
    x = (speech * 32768).astype(np.int16) if kind == "int16" else speech
    write = {"write_function": "soundfile"} if kind == "soundfile" else {}
    with kaldiio.WriteHelper(f"ark,scp:{ark},{tmp_path / 'x.scp'}", **write) as writer:
        writer("other", (RATE, x[:100]))
        writer("utt", (RATE, x))
    entry = (tmp_path / "x.scp").read_text().splitlines()[1].partition(" ")[2]
    back = read_audio(entry, RATE)
    assert back.dtype == np.float32 and back.shape == speech.shape
    assert np.abs(back - speech).max() <= 1 / 32768
    with pytest.raises(InputError, match="not a kaldiio entry"):
        read_audio(f"{ark}:999999", RATE)
    with pytest.raises(InputError, match=r"no such audio file"):
        read_audio(f"{tmp_path}/none.ark:3", RATE)


def test_a_feature_archive_is_not_audio(tmp_path):
    with kaldiio.WriteHelper(f"ark,scp:{tmp_path}/x.ark,{tmp_path}/x.scp") as writer:
        writer("utt", np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match="a matrix without a sampling rate"):
        read_audio((tmp_path / "x.scp").read_text().split()[1], RATE)


def test_a_file_named_like_an_archive_position_is_a_file(tmp_path, speech):
    write_audio(tmp_path / "x.wav", speech, RATE)
    (tmp_path / "x.wav").rename(tmp_path / "a:12")
    assert read_audio(str(tmp_path / "a:12"), RATE).shape == speech.shape


def test_pipe(tmp_path, speech):
    path = tmp_path / "with space.wav"
    write_audio(path, speech, RATE)
    x = read_audio(f"cat {shlex.quote(str(path))} |", RATE)
    np.testing.assert_array_equal(x, read_audio(str(path), RATE))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo oh no >&2; exit 3 |", r"exit status 3 \(oh no\)"),
        ("false | true |", r"exit status 1 \(no message\)"),
        ("true |", "no output"),
        ("echo not audio |", "not audio"),
    ],
)
def test_bad_pipes(command, message):
    with pytest.raises(InputError, match=message):
        read_audio(command, RATE)


def test_bad_files(tmp_path, speech):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("these are words")
    soundfile.write(tmp_path / "stereo.wav", np.stack([speech, speech], 1), RATE)
    soundfile.write(tmp_path / "loud.wav", 3 * speech, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "nothing.wav", speech[:0], RATE)
    for name, message in {
        "missing.wav": "missing.wav: no such audio file",
        "empty.wav": "empty.wav: empty audio file",
        "text.wav": "text.wav: not audio that soundfile can read",
        "stereo.wav": "stereo.wav: 2 channels, one wanted",
        "loud.wav": r"loud.wav: samples beyond \[-1, 1\]",
        "nothing.wav": "nothing.wav: holds no samples",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            read_audio(str(tmp_path / name), RATE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".sph"])
def test_pieces_of_a_recording(tmp_path, speech, suffix):
    path = tmp_path / f"x y{suffix}"
    kind = "NIST" if suffix == ".sph" else suffix[1:].upper()
    soundfile.write(path, speech, RATE, "PCM_16", format=kind)
    whole = read_audio(str(path), RATE)
    for entry in (str(path), f"cat {shlex.quote(str(path))} |"):
        recording = open_recording(entry)
        assert (recording.sampling_rate, recording.num_samples) == (RATE, 1600)
        for start, stop in ((0, 1600), (0, 1), (1599, 1600), (317, 1001)):
            assert np.array_equal(recording.read(start, stop), whole[start:stop])
        with pytest.raises(InputError, match="holds no samples"):
            recording.read(5, 5)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_wav_file_that_is_cut_short_is_refused(tmp_path, speech, subtype):
    path = tmp_path / "x.wav"
    soundfile.write(path, speech, RATE, subtype)
    whole = path.read_bytes()
    assert len(read_audio(str(path), RATE)) == len(speech)
    path.write_bytes(whole + b"LIST" + bytes(4))  # what some editors put behind
    assert len(read_audio(str(path), RATE)) == len(speech)
    path.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=r"x.wav: cut short: its header says \d+ bytes of audio"):
        read_audio(str(path), RATE)
    # A pipe's header, of a program that doesn't know the length.
    place = whole.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):
        endless = whole[:place] + size.to_bytes(4, "little") + whole[place + 4 :]
        path.write_bytes(endless)
        assert len(read_audio(f"cat '{path}' |", RATE)) == len(speech)
        assert len(read_audio(str(path), RATE)) == len(speech)


def test_bad_recordings(tmp_path, speech):
    soundfile.write(tmp_path / "stereo.wav", np.stack([speech, speech], 1), RATE)
    with pytest.raises(InputError, match="2 channels, one wanted"):
        open_recording(str(tmp_path / "stereo.wav")).read(0, 10)
    (tmp_path / "text.wav").write_text("hello" * 99)
    for name, message in (("none.wav", "no such audio file"), ("text.wav", "not audio")):
        with pytest.raises(InputError, match=message):
            open_recording(str(tmp_path / name))


def test_other_rates_are_refused_or_resampled(tmp_path):
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    write_audio(tmp_path / "x.wav", tone, 8000)
    with pytest.raises(InputError, match=r"x.wav: sampled at 8000 Hz, not 16000 Hz"):
        read_audio(str(tmp_path / "x.wav"), RATE)
    x = read_audio(str(tmp_path / "x.wav"), RATE, resample=True)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert x.shape == (16000,)
    assert np.abs(x - expected)[800:-800].max() < 1e-4


def test_sphere(shared_data):
    path = shared_data / "an4_sample/an4/wav/an4_clstk/fash/an251-fash-b.sph"
    raw = path.read_bytes()
    header = int(raw[:16].split()[1])
    byte_order = "<i2" if b"sample_byte_format -s2 01" in raw[:header] else ">i2"
    expected = np.frombuffer(raw[header:], byte_order) / 32768
    np.testing.assert_array_equal(read_audio(str(path), RATE), expected.astype(np.float32))


def test_starts_fast():
    code = (
        "import sys, posinv.data.audio, posinv.data.directory;"
        "import posinv.corpora.mini, posinv.corpora.fsdd;"
        "import posinv.bin.mix_noise;"
        "print({'torch', 'espnet2', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "set()\n", done.stderr
