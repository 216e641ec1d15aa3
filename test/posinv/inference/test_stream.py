import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.bin.enhance import main
from posinv.errors import InputError
from posinv.inference.enhancer import LEVEL, Enhancer
from posinv.inference.stream import EnhancerStream, pipe
from posinv.models.demucs import Demucs

pytestmark = pytest.mark.usefixtures("seeded")


def noise(samples, seed=0, rms=0.1):
    return rms * np.random.default_rng(seed).standard_normal(samples, dtype=np.float32)


@pytest.fixture(scope="module")
def enhancer(enh_dir):
    return Enhancer(enh_dir)


def streamed(stream, wave, size):
    chunks = [stream(wave[start : start + size]) for start in range(0, len(wave), size)]
    return np.concatenate([*chunks, stream.flush()])


def assert_near(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape and actual.dtype == np.float32
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("rms", [1e-4, 0.1])
@pytest.mark.parametrize("mean", [0.0, 0.1])  # in standard deviations
def test_is_the_whole_recording_at_its_level(enhancer, rms, mean):
    wave = noise(40000, rms=rms) + np.float32(mean * rms)
    actual = streamed(enhancer.stream(level=float(wave.std())), wave, 700)
    assert_near(actual, enhancer(wave, 16000))


def test_running_level_keeps_scale(enhancer):
    wave = noise(30000)
    expected = streamed(enhancer.stream(), wave, 1600)
    for factor in (1e-4, 100.0):
        scaled = streamed(enhancer.stream(), (factor * wave).astype(np.float32), 999)
        assert_near((scaled / factor).astype(np.float32), expected)


def test_running_level_of_a_steady_signal_comes_near_the_whole(enhancer):
    wave = noise(80000)
    actual, expected = streamed(enhancer.stream(), wave, 1600), enhancer(wave, 16000)
    difference = np.linalg.norm((actual - expected)[16000:]) / np.linalg.norm(expected[16000:])
    assert difference < 0.02


def test_silence(enhancer):
    assert not streamed(enhancer.stream(), np.zeros(5000, dtype=np.float32), 400).any()


def test_dry_share(enh_dir):
    wave = noise(5000)
    wet = streamed(Enhancer(enh_dir).stream(), wave, 300)
    half = streamed(Enhancer(enh_dir, dry=0.25).stream(), wave, 170)
    assert_near(half, 0.25 * wave + 0.75 * wet, 1e-5)


class TestRefusals:
    def test_not_causal(self, enh_dir, tmp_path):
        shutil.copytree(enh_dir, tmp_path / "exp")
        config = yaml.safe_load((enh_dir / "config.yaml").read_text())
        config["separator_conf"]["causal"] = False
        (tmp_path / "exp/config.yaml").write_text(yaml.safe_dump(config))
        state = torch.load(enh_dir / "valid.loss.best.pth", weights_only=True)
        other = Demucs(**config["separator_conf"]).state_dict()
        state = {k: v for k, v in state.items() if not k.startswith("separator.")}
        state |= {f"separator.{k}": v for k, v in other.items()}
        torch.save(state, tmp_path / "exp/valid.loss.best.pth")
        with pytest.raises(
            InputError, match=r"exp: only a causal DEMUCS can stream, .* not causal"
        ):
            Enhancer(tmp_path / "exp").stream()

    def test_another_model(self, stft_dir):
        with pytest.raises(
            InputError, match=r"stft.*: only a causal DEMUCS can stream, .* another"
        ):
            Enhancer(stft_dir, "model.pth").stream()

    @pytest.mark.parametrize("chunk", [np.zeros((5, 1), np.float32), np.zeros(5, np.int16)])
    def test_chunks(self, enhancer, chunk):
        with pytest.raises(InputError, match="must be floating-point samples"):
            enhancer.stream()(chunk)

    def test_not_finite(self, enhancer):
        with pytest.raises(InputError, match="not finite"):
            enhancer.stream()(np.array([0.0, np.nan]))

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--stream", "x.wav"], "--stream: INPUT is for files"),
            (["--stream", "--out", "x"], "--stream: --out is for files"),
            (["--stream", "--nj", "2"], "--stream: --nj is for files"),
            (["--stream", "--overwrite"], "--stream: --overwrite is for files"),
            (["x.wav"], "give INPUT and --out, or --stream"),
            (["--out", "x"], "give INPUT and --out, or --stream"),
            (["x.wav", "--out", "x", "--level", "0.1"], "--level is for --stream"),
        ],
    )
    def test_options(self, monkeypatch, options, message):
        monkeypatch.setattr(sys, "argv", ["enhance", "--model", "exp", *options])
        with pytest.raises(InputError, match=message):
            main()


class Source(io.RawIOBase):
    """A pipe that gives what is there: reads of any sizes."""

    def __init__(self, data, sizes):
        self.data, self.sizes = data, sizes

    def read(self, most=-1):
        size = min(self.sizes.pop(0) if self.sizes else most, most)
        given, self.data = self.data[:size], self.data[size:]
        return given


class Sink(io.RawIOBase):
    """A pipe that takes no more than 100 bytes at once."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += bytes(data[:100])
        return min(len(data), 100)


def small_stream():
    torch.manual_seed(1)
    model = Demucs(hidden=3, depth=2, resample=2)
    return EnhancerStream(model, LEVEL, level=0.1)


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 3000), sizes=st.lists(st.integers(1, 900), max_size=8))
def test_pipe_is_the_stream(samples, sizes):
    pcm = np.round(noise(samples) * 3e4).clip(-32768, 32767).astype("<i2")
    sink = Sink()
    done = pipe(small_stream(), Source(pcm.tobytes(), sizes), sink)
    assert done.samples == samples and done.real_time_factor > 0
    actual = np.frombuffer(sink.data, "<i2")
    expected = streamed(small_stream(), pcm.astype(np.float32) / 32768, 512)
    assert actual.shape == (samples,)
    np.testing.assert_allclose(actual / 32768, expected.clip(-1, 1), atol=2**-15)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "holds no samples"),
        (b"\1", "holds no samples"),
        (b"RIFF0000WAVE", "a WAV file, but raw samples are needed"),
    ],
)
def test_pipe_refuses(data, message):
    with pytest.raises(InputError, match=f"standard input: .*{message}"):
        pipe(small_stream(), Source(data, []), Sink())


def test_half_a_sample_at_the_end_is_told_after_the_rest(caplog):
    sink = Sink()
    with pytest.raises(InputError, match="ends with half a sample"):
        pipe(small_stream(), Source(bytes(2001), [7, 600]), sink)
    assert len(sink.data) == 2000


def test_clipping_is_told(caplog):
    model = Demucs(hidden=3, depth=2, resample=2)
    stream = EnhancerStream(model, LEVEL, level=1e4)
    sink = Sink()
    pipe(stream, Source(np.full(4000, 20000, "<i2").tobytes(), []), sink)
    assert "samples passed full scale and were clipped" in caplog.text
    assert set(np.abs(np.frombuffer(sink.data, "<i2").astype(int))) & {32767, 32768}


def test_reader_that_goes_away():
    read, write = os.pipe()
    os.close(read)
    closed = pytest.raises(InputError, match="standard output: its reader has closed it")
    with os.fdopen(write, "wb", buffering=0) as sink, closed:
        pipe(small_stream(), Source(bytes(20000), []), sink)


def test_command_is_a_pipe(python, enh_dir, enhancer):
    """A real process: samples come back before the input ends, and nothing else with them."""
    pcm = np.round(noise(48000) * 32768).astype("<i2")
    command = [*python, "-m", "posinv.bin.enhance", "--stream", "--model", enh_dir]
    with subprocess.Popen(
        [*command, "--level", "0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=Path(__file__).parents[3],
    ) as process:
        process.stdin.write(pcm[:16000].tobytes())
        latency = enhancer.stream().latency
        first = b""
        while len(first) < 2 * (16000 - latency) and (more := process.stdout.read(4096)):
            first += more
        rest, log = process.communicate(pcm[16000:].tobytes())
    assert process.returncode == 0, log.decode()
    actual = np.frombuffer(first + rest, "<i2") / 32768
    expected = streamed(enhancer.stream(level=0.1), pcm.astype(np.float32) / 32768, 4000)
    assert len(actual) == 48000
    np.testing.assert_allclose(actual, expected.clip(-1, 1), atol=2**-14)
    lines = log.decode().splitlines()
    assert lines[-1].startswith("3.00 s of audio, real-time factor 0.")
    assert any(f"latency of {1000 * latency / 16000:.1f} ms" in line for line in lines)
