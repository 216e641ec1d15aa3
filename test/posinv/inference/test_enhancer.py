import logging
import math
import shutil
import sys
import tracemalloc
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.bin.cli import run
from posinv.bin.enhance import main
from posinv.data.audio import read_audio
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError
from posinv.espnet.tasks.enh import EnhancementTask
from posinv.inference.enhancer import Enhancer, plan_enhancement


def noise(samples, channels=None, seed=0, rms=0.1):
    shape = samples if channels is None else (samples, channels)
    return rms * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def tones(samples, rate=16000, frequencies=(300.0, 1000.0, 2500.0)):
    time = np.arange(samples) / rate
    return sum(0.1 * np.sin(2 * np.pi * f * time) for f in frequencies).astype(np.float32)


@pytest.fixture(scope="module")
def model_dir(enh_dir, tmp_path_factory):
    """A random enhancement model whose output follows its input, not its biases."""
    directory = tmp_path_factory.mktemp("tiny model")
    shutil.copy(enh_dir / "config.yaml", directory)
    state = torch.load(enh_dir / "valid.loss.best.pth", weights_only=True)
    for name, value in state.items():
        value *= 0 if "bias" in name else 3
    torch.save(state, directory / "valid.loss.best.pth")
    return directory


@pytest.fixture(scope="module")
def enhancer(model_dir):
    return Enhancer(model_dir, segment=1.0, overlap=0.25)


@pytest.fixture
def stub(model_dir, monkeypatch):
    """Return a maker of enhancers around a function of one waveform ``(T,)``."""

    def make(function, segment=1.0, overlap=0.25):
        made = Enhancer(model_dir, segment=segment, overlap=overlap)
        monkeypatch.setattr(made, "separate", lambda wave, fs: [function(wave[0])[None]])
        return made

    return make


def model_alone(model_dir, wave):
    """The oracle: ESPnet's model by itself on ``(T,)``."""
    model, _ = EnhancementTask.build_model_from_file(
        model_dir / "config.yaml", model_dir / "valid.loss.best.pth"
    )
    with torch.no_grad():
        batch = torch.from_numpy(wave)[None], torch.tensor([len(wave)])
        [[enhanced], *_] = model.eval().forward_enhance(*batch, {})
    return enhanced[0].numpy()


@pytest.mark.parametrize("samples", [1600, 7001, 16000])
def test_one_piece_is_the_model_alone_at_the_level_of_speech(model_dir, enhancer, samples):
    wave = noise(samples, rms=0.003)
    gain = 0.05 / np.sqrt(np.mean(wave.astype(float) ** 2))
    expected = model_alone(model_dir, (gain * wave).astype(np.float32)) / gain
    enhanced = enhancer(wave, 16000)
    assert enhanced.dtype == np.float32 and enhanced.shape == wave.shape
    np.testing.assert_allclose(enhanced, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_silence_is_what_the_model_makes_of_it(model_dir, stub, enhancer):
    silence = np.zeros(4000, dtype=np.float32)
    np.testing.assert_array_equal(enhancer(silence, 16000), model_alone(model_dir, silence))
    np.testing.assert_array_equal(stub(lambda wave: wave + 0.25)(silence, 16000), silence + 0.25)


def test_output_scales_with_input(model_dir, enhancer):
    wave = noise(40000, 2)
    enhanced = enhancer(wave, 16000)
    largest = np.abs(enhanced).max()
    for factor in (1e-6, 0.01, 10.0, 1e4):
        scaled = enhancer((factor * wave).astype(np.float32), 16000) / np.float32(factor)
        np.testing.assert_allclose(scaled, enhanced, rtol=0, atol=1e-5 * largest)
    alone, quiet = (model_alone(model_dir, factor * wave[:16000, 0]) for factor in (1, 0.01))
    assert np.abs(alone - quiet / np.float32(0.01)).max() > 0.1 * np.abs(alone).max()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_segments_of_a_pointwise_model_are_the_whole(data):
    segment = data.draw(st.floats(0.1, 0.5))
    overlap = data.draw(st.floats(0, segment / 2))
    samples = data.draw(st.integers(1, 50000))
    wave = noise(samples)
    enhancer = Enhancer.__new__(Enhancer)
    enhancer.dry = 0.0
    enhancer.segment, enhancer.overlap = round(segment * 16000), math.floor(overlap * 16000)
    pieces = []
    enhancer.separate = lambda x, fs: pieces.append(x.shape[1]) or [x * np.abs(x)]
    gain = 0.05 / np.sqrt(np.mean(wave.astype(float) ** 2))
    level = (gain * wave).astype(np.float32)
    expected = (level * np.abs(level) / gain).astype(np.float32)
    np.testing.assert_array_equal(enhancer(wave, 16000), expected)
    if samples > enhancer.segment:
        assert set(pieces) == {enhancer.segment}
        hop = enhancer.segment - enhancer.overlap
        assert len(pieces) == 1 + math.ceil((samples - enhancer.segment) / hop)
    else:
        assert pieces == [max(samples, 1600)]


@pytest.mark.parametrize("samples", [3000, 10000, 12001, 14800])
def test_cross_fades_are_linear_from_segment_to_segment(stub, samples):
    counted = iter(range(1, 100))
    numbered = stub(lambda wave: np.full_like(wave, next(counted)), segment=0.2, overlap=0.05)
    enhanced = numbered(np.zeros(samples), 16000)
    position = np.arange(samples)
    expected = np.ones(samples)
    for start in range(2400, samples - 800, 2400):  # a step that ramps over 800 samples
        expected += np.clip((position - start + 0.5) / 800, 0, 1)
    np.testing.assert_allclose(enhanced, expected, rtol=1e-6)
    assert next(counted) == math.ceil((samples - 800) / 2400) + 1


def test_segments_of_a_causal_model_are_near_the_whole(model_dir, enhancer):
    """Segments begin without a past: what is far enough from their beginnings agrees."""
    wave = np.tile(noise(1600), 41)  # as loud in every segment
    whole = Enhancer(model_dir, segment=60)(wave, 16000)
    parts = enhancer(wave, 16000)
    assert parts.shape == whole.shape == wave.shape
    since = np.arange(len(wave)) % 12000
    settled = (since >= 8000) & (np.arange(len(wave)) < 60000)
    error = np.abs(parts - whole) / np.abs(whole).max()
    assert error[settled].max() < 5e-5
    assert error[~settled].max() > 5e-4  # the beginnings


@pytest.mark.parametrize("rate", [16000, 44100])
def test_channels_are_enhanced_by_themselves(enhancer, rate):
    left = noise(50000)
    stereo = np.stack([left, left[::-1]], axis=1)  # of one level
    enhanced = enhancer(stereo, rate)
    for channel in range(2):
        alone = enhancer(stereo[:, channel], rate)
        np.testing.assert_allclose(enhanced[:, channel], alone, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(enhancer(np.asfortranarray(stereo), rate), enhanced)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 96000])
@pytest.mark.parametrize("samples", [1, 2, 7, 400, 44100, 70001])
def test_length_is_kept_at_every_rate(stub, rate, samples):
    heard = []
    enhancer = stub(lambda wave: heard.append(len(wave)) or wave, segment=100, overlap=0)
    enhanced = enhancer(noise(samples, 2), rate)
    assert enhanced.shape == (samples, 2) and np.isfinite(enhanced).all()
    assert heard == 2 * [max(1600, math.ceil(samples * 16000 / rate))]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_resampling_there_and_back_keeps_time_and_level(stub, rate):
    wave = tones(2 * rate, rate)
    np.testing.assert_allclose(
        stub(lambda x: x)(wave, rate)[1000:-1000], wave[1000:-1000], rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("rate, channels", [(16000, 1), (8000, 1), (44100, 2)])
def test_file_gives_the_samples_of_the_array(enhancer, tmp_path, rate, channels):
    wave = noise(2 * 65536 + 4321, channels)
    source, destination = tmp_path / "a b.wav", tmp_path / "new folder" / "c d.wav"
    soundfile.write(source, wave, rate, "FLOAT")
    done = []
    seconds = enhancer.enhance_file(source, destination, done.append)
    assert seconds == pytest.approx(len(wave) / rate) == pytest.approx(sum(done))
    enhanced, written_rate = soundfile.read(destination, dtype="float32", always_2d=True)
    assert written_rate == rate
    np.testing.assert_array_equal(enhanced, enhancer(wave, rate))
    assert list(destination.parent.iterdir()) == [destination]


def write_as(path, wave, rate, file_format, subtype):
    if not soundfile.check_format(file_format, subtype):
        pytest.skip(f"this libsndfile has no {file_format} {subtype}")
    soundfile.write(path, wave, rate, subtype, format=file_format)


@pytest.mark.parametrize(
    "suffix, file_format, subtype, atol",
    [
        ("wav", "WAV", "PCM_16", 2**-15),
        ("wav", "WAV", "PCM_24", 2**-22),
        ("WAV", "WAVEX", "PCM_32", 2**-22),
        ("wav", "WAV", "DOUBLE", 0),
        ("wav", "WAV", "ULAW", 0.02),
        ("flac", "FLAC", "PCM_24", 2**-22),
        ("aiff", "AIFF", "PCM_16", 2**-15),
        ("sph", "NIST", "PCM_16", 2**-15),
        ("ogg", "OGG", "VORBIS", None),
        ("opus", "OGG", "OPUS", None),
        ("mp3", "MP3", "MPEG_LAYER_III", None),
    ],
)
def test_format_subtype_and_length_are_kept(enhancer, tmp_path, suffix, file_format, subtype, atol):
    source, destination = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    write_as(source, np.stack(2 * [tones(50001, 48000)], axis=1), 48000, file_format, subtype)
    enhancer.enhance_file(source, destination)
    before, after = soundfile.info(source), soundfile.info(destination)
    for name in ("format", "subtype", "samplerate", "channels", "frames"):
        assert getattr(after, name) == getattr(before, name)
    assert after.frames == 50001
    expected = enhancer(*soundfile.read(source, dtype="float32"))
    enhanced, _ = soundfile.read(destination, dtype="float32")
    if atol is None:  # lossy
        assert np.corrcoef(enhanced[:, 0], expected[:, 0])[0, 1] > 0.99
    else:
        np.testing.assert_allclose(enhanced, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "source, destination, written",
    [
        (("wav", "WAV", "PCM_24"), "flac", ("FLAC", "PCM_24")),
        (("wav", "WAV", "FLOAT"), "flac", ("FLAC", "PCM_24")),
        (("flac", "FLAC", "PCM_16"), "wav", ("WAV", "PCM_16")),
        (("ogg", "OGG", "VORBIS"), "flac", ("FLAC", "PCM_16")),
        (("mp3", "MP3", "MPEG_LAYER_III"), "wav", ("WAV", "PCM_16")),
        (("wav", "WAV", "FLOAT"), "ogg", ("OGG", "VORBIS")),
    ],
)
def test_suffix_names_the_format(enhancer, tmp_path, source, destination, written):
    suffix, *encoding = source
    path = tmp_path / f"in.{suffix}"
    write_as(path, noise(5000), 16000, *encoding)
    enhancer.enhance_file(path, tmp_path / f"out.{destination}")
    info = soundfile.info(tmp_path / f"out.{destination}")
    assert (info.format, info.subtype, info.frames) == (*written, 5000)


def test_clipping_is_told_and_counted(stub, tmp_path, caplog):
    louder = stub(lambda wave: 10 * wave)
    wave = np.round(noise(5000, 2, rms=0.08) * 32768).astype(np.float32) / 32768
    clipped = np.count_nonzero(np.abs(10 * wave) > 1)
    assert 0 < clipped < wave.size
    soundfile.write(tmp_path / "in.wav", wave, 16000, "PCM_16")
    louder.enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
    assert f"out.wav: {clipped} samples passed full scale" in caplog.text
    enhanced, _ = soundfile.read(tmp_path / "out.wav")
    np.testing.assert_allclose(enhanced, np.clip(10 * wave, -1, 1), atol=2**-14)
    caplog.clear()
    soundfile.write(tmp_path / "float.wav", wave, 16000, "FLOAT")
    louder.enhance_file(tmp_path / "float.wav", tmp_path / "out.wav")
    assert not caplog.text
    enhanced, _ = soundfile.read(tmp_path / "out.wav")
    np.testing.assert_allclose(enhanced, 10 * wave, rtol=1e-5)


def test_memory_does_not_grow_with_length(stub, tmp_path):
    heard = []
    enhancer = stub(lambda wave: heard.append(len(wave)) or wave, segment=2.0)
    peaks = []
    for seconds in (10, 60):
        path = tmp_path / f"{seconds}.wav"
        soundfile.write(path, noise(seconds * 44100, 2), 44100)
        tracemalloc.start()
        enhancer.enhance_file(path, tmp_path / "out.wav")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert set(heard) == {32000}
    assert peaks[1] < 1.1 * peaks[0]


def test_channels_do_not_change_each_other(enhancer):
    quiet, loud = noise(20000, seed=0), noise(20000, seed=1)
    alone = enhancer(0.01 * quiet, 16000)
    together = enhancer(np.stack([0.01 * quiet, loud], 1), 16000)
    np.testing.assert_allclose(together[:, 0], alone, rtol=0, atol=1e-7)


def test_dry_share(model_dir):
    x = noise(20000)
    wet = Enhancer(model_dir, segment=0.6, overlap=0.1)(x, 16000)
    half = Enhancer(model_dir, segment=0.6, overlap=0.1, dry=0.25)(x, 16000)
    np.testing.assert_allclose(half, 0.25 * x + 0.75 * wet, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"dry share of 1\.5: must be from 0 to 1"):
        Enhancer(model_dir, dry=1.5)


def test_a_wav_file_too_long_for_its_header_is_rf64(enhancer, tmp_path, monkeypatch):
    """The sizes in a WAV header have 32 bits; the limit is lowered here."""
    x = np.stack([noise(8000, seed=0), noise(8000, seed=1)], 1)
    soundfile.write(tmp_path / "in.wav", x, 16000, "PCM_24")
    monkeypatch.setattr("posinv.inference.enhancer.MAX_WAV_BYTES", 8000 * 2 * 3 - 1)
    enhancer.enhance_file(tmp_path / "in.wav", tmp_path / "long.wav")
    monkeypatch.setattr("posinv.inference.enhancer.MAX_WAV_BYTES", 8000 * 2 * 3)
    enhancer.enhance_file(tmp_path / "in.wav", tmp_path / "short.wav")
    assert soundfile.info(tmp_path / "long.wav").format == "RF64"
    assert soundfile.info(tmp_path / "short.wav").format == "WAV"
    long, short = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("long", "short"))
    assert np.array_equal(long, short)


@pytest.mark.parametrize("rate", [8000, 16000, 96000])
@pytest.mark.parametrize("samples", [1, 3])
def test_files_of_a_few_samples(enhancer, tmp_path, rate, samples):
    soundfile.write(tmp_path / "in.wav", np.full(samples, 0.25), rate, "FLOAT")
    enhancer.enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
    enhanced, written_rate = soundfile.read(tmp_path / "out.wav")
    assert enhanced.shape == (samples,) and written_rate == rate
    assert np.abs(enhanced).max() > 0


@pytest.mark.parametrize("samples", [1, 100, 1601, 40003])
def test_another_model_of_espnet(stft_dir, samples):
    enhanced = Enhancer(stft_dir, "model.pth", segment=1, overlap=0.2)(noise(samples), 16000)
    assert enhanced.shape == (samples,) and np.isfinite(enhanced).all()
    assert np.abs(enhanced).max() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(model_dir):
    with pytest.raises(InputError, match="device cuda: no GPU here"):
        Enhancer(model_dir, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees(model_dir, enhancer):
    wave = noise(40000, 2)
    on_gpu = Enhancer(model_dir, device="cuda", segment=1.0, overlap=0.25)(wave, 44100)
    np.testing.assert_allclose(on_gpu, enhancer(wave, 44100), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segment": 0.09}, "segment of 0.09 s: must be at least 0.1"),
        ({"segment": math.inf}, "segment of inf s"),
        ({"segment": math.nan}, "segment of nan s"),
        ({"segment": 1, "overlap": 0.51}, r"overlap of 0.51 s: must be from 0 to .* \(0.5 s\)"),
        ({"overlap": -0.1}, "overlap of -0.1 s"),
    ],
)
def test_bad_options(model_dir, options, message):
    with pytest.raises(InputError, match=message):
        Enhancer(model_dir, **options)


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros((5, 0)), np.zeros((2, 2, 2)), [1, 2]])
def test_bad_arrays(enhancer, wave):
    with pytest.raises(InputError, match=r"must be floating-point samples \(T,\) or \(T, C\)"):
        enhancer(wave, 16000)


@pytest.mark.parametrize("channels, samples", [(1, 65), (2, 16000), (64, 100)])
def test_channels_first_is_refused(enhancer, channels, samples):
    wave = noise(samples, channels).T
    message = rf"of shape \({channels}, {samples}\): channels come last, \(T, C\); transpose it"
    for array in (wave, torch.from_numpy(wave.copy())):
        with pytest.raises(InputError, match=message):
            enhancer(array, 16000)


def test_more_channels_than_samples(stub):
    assert stub(lambda x: x)(noise(3, 64), 16000).shape == (3, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(enhancer, stub, tmp_path, value):
    wave = noise(3000)
    with pytest.raises(InputError, match="sampling rate of 0 Hz"):
        enhancer(wave, 0)
    with pytest.raises(InputError, match="the model gives samples that are not finite"):
        stub(lambda x: x * value)(wave, 16000)
    wave[1234] = value
    with pytest.raises(InputError, match="audio to enhance: samples that are not finite"):
        enhancer(wave, 16000)
    soundfile.write(tmp_path / "in.wav", wave, 16000, "FLOAT")
    with pytest.raises(InputError, match=r"in\.wav: samples that are not finite"):
        enhancer.enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["in.wav"]


def test_bad_files(enhancer, tmp_path, caplog):
    def enhance(name, to="out.wav"):
        enhancer.enhance_file(tmp_path / name, tmp_path / to)

    with pytest.raises(InputError, match=r"no\.wav: no such audio file"):
        enhance("no.wav")
    for name in ("text.wav", "text.raw"):
        (tmp_path / name).write_text("not audio\n")
        with pytest.raises(InputError, match=rf"{name}: not audio that soundfile can read"):
            enhance(name)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(InputError, match=r"empty\.wav: holds no samples"):
        enhance("empty.wav")
    soundfile.write(tmp_path / "many.wav", noise(100, 9), 16000)
    with pytest.raises(InputError, match="can't write FLAC PCM_16 of 9 channels at 16000 Hz"):
        enhance("many.wav", "out.flac")
    with pytest.raises(InputError, match=r"out\.txt: no audio format by its suffix"):
        enhance("many.wav", "out.txt")
    soundfile.write(tmp_path / "whole.flac", noise(100000), 16000)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"half\.flac: not audio that soundfile can read"):
        enhance("half.flac")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_truncated_mp3_is_told(enhancer, tmp_path, caplog):
    write_as(tmp_path / "whole.mp3", noise(100000), 16000, "MP3", "MPEG_LAYER_III")
    content = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "half.mp3").write_bytes(content[: len(content) // 2])
    enhancer.enhance_file(tmp_path / "half.mp3", tmp_path / "out.mp3")
    assert "half.mp3: " in caplog.text and "of the 100000 samples" in caplog.text


@pytest.fixture
def inputs(tmp_path):
    """A folder of audio, and a list of a file, a command and an archive entry."""
    folder = tmp_path / "my recordings"
    (folder / "day 1" / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.wav", "day 1/b b.FLAC", "day 1/deep/c.ogg"]):
        rate = (8000, 16000, 44100)[number]
        soundfile.write(folder / name, noise(rate, seed=number), rate)
    (folder / "notes.txt").write_text("x")
    (folder / "._a.wav").write_text("x")
    soundfile.write(tmp_path / "d d.flac", noise(24000, 2), 24000, "PCM_24")
    pcm = (noise(9000) * 32768).astype(np.int16)
    kaldiio.save_ark(str(tmp_path / "x.ark"), {"u3": (8000, pcm)}, scp=str(tmp_path / "x.scp"))
    soundfile.write(tmp_path / "e.wav", pcm[:7000], 16000)
    table = {
        "u1": tmp_path / "d d.flac",
        "u2.x": f"cat '{tmp_path / 'e.wav'}' |",
        **read_table(tmp_path / "x.scp"),
    }
    write_table(tmp_path / "wav.scp", table)
    return tmp_path


def command(monkeypatch, model_dir, *arguments):
    options = ["--model", str(model_dir), "--segment", "0.6"]
    words = [*options, "--overlap", "0.1", "--allow_pipes", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", ["posinv/bin/enhance.py", *words])
    run(main)


def files(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_command(inputs, monkeypatch, capsys, model_dir, caplog):
    caplog.set_level(logging.INFO)
    out = inputs / "the output"
    arguments = (inputs / "my recordings", inputs / "wav.scp", inputs / "e.wav", "--out", out)
    command(monkeypatch, model_dir, *arguments)
    written = ["a.wav", "day 1/b b.FLAC", "day 1/deep/c.ogg", "e.wav"]
    assert files(out) == sorted([*written, "u1.wav", "u2.x.wav", "u3.wav", "wav.scp"])
    assert "3 audio files, 2 others ignored" in caplog.text
    minutes = (3 + 1 + (7000 + 7000) / 16000 + 9000 / 8000) / 60
    assert f"{out}: 7 files, {minutes:.1f} minutes of audio, real-time" in capsys.readouterr().out
    assert read_table(out / "wav.scp") == {u: f"{out}/{u}.wav" for u in ("u1", "u2.x", "u3")}
    enhancer = Enhancer(model_dir, segment=0.6, overlap=0.1)
    enhanced, rate = soundfile.read(out / "u1.wav", dtype="float32")
    assert rate == 24000 and soundfile.info(out / "u1.wav").subtype == "PCM_24"
    expected = enhancer(*soundfile.read(inputs / "d d.flac", dtype="float32"))
    np.testing.assert_allclose(enhanced, expected, rtol=0, atol=2**-22)
    for utterance, own_rate in (("u2.x", 16000), ("u3", 8000)):
        entry = read_table(inputs / "wav.scp")[utterance]
        expected = enhancer(read_audio(entry, own_rate), own_rate)
        enhanced, rate = soundfile.read(out / f"{utterance}.wav", dtype="float32")
        assert rate == own_rate
        np.testing.assert_allclose(enhanced, expected, rtol=0, atol=2**-15)

    before = (out / "a.wav").stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit_status:
        command(monkeypatch, "not even a model", *arguments)
    assert exit_status.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"enhance: error: {out / 'a.wav'}: exists (8 of 8 outputs do)")
    assert error.count("\n") == 1
    (out / "u3.wav").unlink()
    command(monkeypatch, model_dir, *arguments, "--skip_existing")
    assert f"{out}: 7 files (6 of them existed), 0.0 minutes" in capsys.readouterr().out
    assert (out / "a.wav").stat().st_mtime_ns == before
    assert read_table(out / "wav.scp") == {u: f"{out}/{u}.wav" for u in ("u1", "u2.x", "u3")}
    command(monkeypatch, model_dir, *arguments, "--overwrite")
    assert (out / "a.wav").stat().st_mtime_ns > before
    command(monkeypatch, model_dir, *arguments[:2], "--out", out / "flac", "--format", "flac")
    names = ["a.flac", "day 1/b b.flac", "day 1/deep/c.flac", "u1.flac", "u2.x.flac", "u3.flac"]
    assert files(out / "flac") == [*names, "wav.scp"]
    assert soundfile.info(out / "flac" / "u1.flac").subtype == "PCM_24"


def test_several_processes_write_what_one_does(inputs, monkeypatch, capsys, model_dir):
    outs = [inputs / f"nj{nj}" for nj in (1, 2)]
    write_table(inputs / "bad.scp", {**read_table(inputs / "wav.scp"), "u4": "cat none |"})
    for nj, out in enumerate(outs, start=1):
        arguments = (inputs / "my recordings", inputs / "bad.scp", "--out", out, "--nj", nj)
        with pytest.raises(SystemExit):
            command(monkeypatch, model_dir, *arguments)
        told = capsys.readouterr()
        assert f"{out}: 6 files, " in told.out and "1 of 7 files were not" in told.err
    assert files(outs[0]) == files(outs[1])
    for name in files(outs[0]):
        if name != "wav.scp":
            wave, other = (soundfile.read(out / name)[0] for out in outs)
            np.testing.assert_allclose(wave, other, rtol=0, atol=2**-14)
    with pytest.raises(SystemExit):
        command(monkeypatch, model_dir, *arguments, "--ngpu", 1)
    assert "--nj 2 --ngpu 1: one process uses a GPU" in capsys.readouterr().err


def test_bad_files_do_not_end_a_run(inputs, monkeypatch, capsys, model_dir):
    folder, out = inputs / "my recordings", inputs / "out"
    (folder / "bad.wav").write_text("x")
    soundfile.write(folder / "nan.wav", np.full(9000, np.nan), 16000, "FLOAT")
    with pytest.raises(SystemExit) as exit_status:
        command(monkeypatch, model_dir, folder, "--out", out)
    assert exit_status.value.code == 1
    assert files(out) == ["a.wav", "day 1/b b.FLAC", "day 1/deep/c.ogg"]
    told = capsys.readouterr()
    assert f"{out}: 3 files, " in told.out
    error = told.err.splitlines()[-1]
    assert error.startswith("enhance: error: 2 of 5 files were not enhanced: ")
    assert "bad.wav: not audio" in error and "nan.wav: samples that are not finite" in error


def test_plan_refuses(inputs):
    folder = inputs / "my recordings"

    def refuse(message, *paths, out=inputs / "out", **options):
        with pytest.raises(InputError, match=message):
            plan_enhancement(paths, out, allow_pipes=True, **options)

    refuse(r"no\.wav: no such file or folder", inputs / "no.wav")
    refuse("would overwrite the source", folder, out=folder)
    refuse("would overwrite the source", folder, out=folder / "out")
    refuse(r"e\.wav: would be written over an input", inputs / "e.wav", out=inputs)
    refuse(r"wav\.scp: would be written over an input", inputs / "wav.scp", out=inputs)
    refuse(r"e\.wav: not a folder", folder, out=inputs / "e.wav")
    refuse(r"out/a\.wav: would be written for .* and for", folder, folder / "a.wav")
    soundfile.write(folder / "a.flac", noise(100), 16000)
    refuse(r"out/a\.wav: would be written for", folder, audio_format="wav")
    jobs, wrong = plan_enhancement([folder], inputs / "out")
    assert len(jobs) == 4 and not wrong
    (inputs / "texts").mkdir()
    (inputs / "texts" / "a.txt").write_text("x")
    refuse("texts: no audio files in it", inputs / "texts")
    write_table(inputs / "bad.scp", {"../u": inputs / "e.wav"})
    refuse(r"bad\.scp: id \.\./u", inputs / "bad.scp")
    write_table(inputs / "bad.scp", {"u": inputs / "missing.wav"})
    soundfile.write(inputs / "many.wav", noise(100, 9), 16000)
    for name, message in (("bad.scp", "no such audio file"), ("many.wav", "can't write FLAC")):
        jobs, wrong = plan_enhancement([inputs / name], inputs / "out", audio_format="flac")
        assert not jobs and message in " ".join(wrong.values())
    assert not (inputs / "out").exists()
