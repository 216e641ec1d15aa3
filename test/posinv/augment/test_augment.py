import copy
import math
import pickle
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.augment.add_noise import AddNoise
from posinv.augment.draws import random_state
from posinv.augment.noise import FADE_SECONDS, seamless
from posinv.augment.pad import ZeroPad
from posinv.augment.pitch import PitchShift
from posinv.augment.speed import SpeedPerturb
from posinv.augment.views import Perturbation
from posinv.data.audio import read_audio, write_audio
from posinv.data.tables import write_table
from posinv.errors import InputError


def tone(frequency: float, length: int) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(length) / 16000)


def alone(perturb, wave: torch.Tensor, key: str = "utt") -> torch.Tensor:
    out, lengths = perturb(wave[None], torch.tensor([len(wave)]), [key])
    assert out.shape == (1, lengths[0])
    return out[0]


def decibels(x: torch.Tensor, y: torch.Tensor) -> float:
    return 10 * math.log10(x.double().square().sum() / y.double().square().sum())


@pytest.fixture(scope="module")
def speech(shared_data) -> list[torch.Tensor]:
    """Real speech of four speakers, two women and two men."""
    names = ["cen7-fash-b", "cen8-fcaw-b", "cen8-mmxg-b", "cen8-mwhw-b"]
    paths = [next(shared_data.glob(f"an4_sample/an4/wav/*/*/{name}.sph")) for name in names]
    return [torch.from_numpy(read_audio(str(path), 16000)) for path in paths]


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.0, 1.1, 1.15])
def test_speed_moves_pitch_and_length_exactly(factor):
    lengths = torch.tensor([16000, 7999])
    waves = torch.stack([tone(500, 16000), tone(500, 16000)])
    sped, sped_lengths = SpeedPerturb([factor])(waves, lengths, ["a", "b"])
    assert sped_lengths.tolist() == [
        math.ceil(round(n * 100) / round(factor * 100)) for n in (16000, 7999)
    ]
    for wave, length in zip(sped, sped_lengths.tolist(), strict=True):
        spectrum = np.abs(np.fft.rfft(wave[:length].numpy() * np.hanning(length), 2**18))
        assert spectrum.argmax() * 16000 / 2**18 == pytest.approx(500 * factor, abs=0.5)
        assert wave[length:].abs().sum() == 0
        # Away from the edges, the level is kept.
        assert wave[200 : length - 200].square().mean() == pytest.approx(0.5, rel=0.02)


def test_speed_agrees_with_librosa():
    wave = torch.from_numpy(np.random.default_rng(0).standard_normal(8000)).float()
    wave = torch.from_numpy(
        librosa.resample(wave.numpy(), orig_sr=8000, target_sr=16000)
    )  # band-limited
    sped, lengths = SpeedPerturb([1.1])(wave[None], torch.tensor([16000]), ["a"])
    other = librosa.resample(wave.numpy(), orig_sr=11, target_sr=10, res_type="soxr_vhq")
    assert abs(lengths.item() - len(other)) <= 1
    inner = slice(100, lengths.item() - 100)
    error = np.linalg.norm(sped[0].numpy()[inner] - other[inner]) / np.linalg.norm(other[inner])
    assert error < 0.1


def test_speed_of_a_batch_is_that_of_each_alone():
    torch.manual_seed(3)
    waves, lengths, keys = (
        torch.randn(6, 5000),
        torch.tensor([5000, 1, 4000, 401, 3200, 5000]),
        list("abcdef"),
    )
    speed = SpeedPerturb([0.85, 1.0, 1.15])
    batch, batch_lengths = speed(waves, lengths, keys)
    for b, key in enumerate(keys):
        alone, alone_length = speed(waves[b : b + 1, : lengths[b]], lengths[b : b + 1], [key])
        assert alone_length[0] == batch_lengths[b]
        torch.testing.assert_close(batch[b, : alone_length[0]], alone[0], rtol=0, atol=1e-6)


def test_mixed_precision_leaves_the_views_alone():
    views = Perturbation(speed=[0.9, 1.1], semitones=[-2, 2], hop=320)
    batch = tone(300, 16000)[None], torch.tensor([16000]), ["a"]
    expected, _ = views(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = views(*batch)
    assert torch.equal(found, expected)


def test_draws_depend_on_key_and_seed_alone():
    speed, lengths = SpeedPerturb([0.8, 0.9, 1.0, 1.1, 1.2]), torch.full((40,), 1000)
    keys = [f"utt{i}" for i in range(40)]

    def draw(keys):
        return dict(zip(keys, speed(torch.zeros(40, 1000), lengths, keys)[1].tolist(), strict=True))

    torch.manual_seed(1)
    first = draw(keys)
    torch.rand(7)  # earlier draws have no effect
    assert draw(keys[::-1]) == first
    assert len(set(first.values())) == 5
    torch.manual_seed(2)
    assert draw(keys) != first


def test_purposes_draw_apart():
    assert random_state("utt", "speed").random() != random_state("utt", "zero_pad").random()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 50000), seed=st.integers(0, 10**6))
def test_zero_pad(length, seed):
    torch.manual_seed(seed)
    wave = torch.ones(1, length)
    padded, lengths, hops = ZeroPad(0.02, 0.05, hop=320)(wave, torch.tensor([length]), ["utt"])
    front = hops.item() * 320
    total = lengths.item() - length
    assert padded.shape == (1, lengths.item())
    assert (padded[0, front : front + length] == 1).all()
    assert padded.sum() == length
    # Rounding the front to whole hops may add at most half a hop to the largest share.
    assert math.floor(0.02 * length) <= total <= math.ceil(0.05 * length) + 160


def test_zero_pad_uses_its_range():
    lengths = torch.full((300,), 160000)
    _, padded, hops = ZeroPad(0.02, 0.05, hop=320)(
        torch.zeros(300, 160000), lengths, [f"utt{i}" for i in range(300)]
    )
    share = (padded - lengths) / 160000
    assert 0.02 <= share.min() < 0.0225
    assert 0.0475 < share.max() <= 0.05
    assert hops.min() == 0
    assert hops.max() > 20


@pytest.mark.parametrize("factors", [[], [0.4], [1.0, 2.5]])
def test_speed_refuses_factors(factors):
    with pytest.raises(
        InputError, match=r"speed factors must be one or more numbers in \[0\.5, 2\]"
    ):
        SpeedPerturb(factors)


@pytest.mark.parametrize("low, high", [(-0.1, 0.1), (0.2, 0.1)])
def test_zero_pad_refuses_ranges(low, high):
    with pytest.raises(InputError, match="zero-padding range must be 0 <= low <= high"):
        ZeroPad(low, high, 320)


@pytest.mark.parametrize("semitones", [-12, -2, -0.3, 0.07, 2, 5, 12])
@pytest.mark.parametrize("frequency", [200, 1234.5, 3000])
def test_pitch_of_tones(semitones, frequency):
    wave = tone(frequency, 16000)
    shifted = alone(PitchShift([semitones]), wave)
    spectrum = np.abs(np.fft.rfft(shifted.numpy() * np.hanning(16000), 2**20))
    peak = spectrum.argmax() * 16000 / 2**20
    assert 1200 * math.log2(peak / frequency) == pytest.approx(100 * semitones, abs=1)  # cents
    assert decibels(shifted, wave) == pytest.approx(0, abs=0.5)
    # No clicks, neither in a tone that begins and ends suddenly nor in one that fades.
    step = wave.diff().abs().max() * max(1, 2 ** (semitones / 12))
    assert shifted.diff().abs().max() < 1.3 * step
    fade = torch.linspace(0, 1, 800)
    faded = wave * torch.cat([fade, torch.ones(14400), fade.flip(0)])
    shifted = F.pad(alone(PitchShift([semitones]), faded), (1, 1))
    assert shifted.diff().abs().max() < 1.07 * step


@settings(max_examples=100, deadline=None)
@given(st.floats(-12, 12))
def test_pitch_ratio_is_within_half_a_cent_and_small(semitones):
    (ratio,) = PitchShift([semitones]).ratios
    assert abs(1200 * math.log2(ratio) - 100 * semitones) <= 0.5
    assert ratio.numerator * ratio.denominator < 3000**2


@pytest.mark.parametrize("semitones", [-2, 2])
def test_pitch_level_and_timing_of_speech(speech, semitones):
    for wave in speech:
        shifted = alone(PitchShift([semitones]), wave)
        assert shifted.shape == wave.shape
        assert decibels(shifted, wave) == pytest.approx(0, abs=0.5)
        before, after = (
            librosa.pyin(x.numpy(), fmin=60, fmax=500, sr=16000, frame_length=1024)[0]
            for x in (wave, shifted)
        )
        cents = np.nanmedian(1200 * np.log2(after / before))
        assert cents == pytest.approx(100 * semitones, abs=10)  # pyin's resolution
        # The envelope, over 64 ms at 1 kHz, is not shifted.
        before, after = (
            librosa.feature.rms(y=x.numpy(), frame_length=1024, hop_length=16)[0]
            for x in (wave, shifted)
        )
        match = np.correlate(before[100:-100], after, "valid")
        assert abs(match.argmax() - 100) <= 2  # ms
        # No clicks at its beginning and end.
        steps, given = (F.pad(x, (1, 1)).diff().abs() for x in (shifted, wave))
        for edge, near in ((slice(400), slice(1600)), (slice(-400, None), slice(-1600, None))):
            assert steps[edge].max() < 1.2 * given[near].max()


@pytest.mark.parametrize("semitones", [-4, 3])
def test_pitch_shift_agrees_with_librosa(speech, semitones):
    def librosa_shift(x: np.ndarray, n_fft: int) -> np.ndarray:
        options = {"sr": 16000, "n_steps": semitones, "n_fft": n_fft, "hop_length": n_fft // 4}
        return librosa.effects.pitch_shift(x, **options)

    def spectrum(x: np.ndarray) -> np.ndarray:  # away from edges, in 40 bands, without level
        mel = librosa.feature.melspectrogram(y=x, sr=16000, n_fft=1024, hop_length=128, n_mels=40)
        mel = mel[:, 16 : 16 + (mel.shape[1] - 32) // 8 * 8].reshape(40, -1, 8).mean(axis=2)
        log = np.log(mel + 1e-4 * mel.max())
        return log - log.mean()

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return np.sqrt(np.mean((spectrum(x) - spectrum(y)) ** 2))

    for wave in speech:
        shifted, wave = alone(PitchShift([semitones]), wave).numpy(), wave.numpy()
        other, third = librosa_shift(wave, 1024), librosa_shift(wave, 512)
        # It differs from librosa about as much as librosa does with another window.
        assert distance(shifted, other) < 1.15 * distance(other, third)
        assert distance(shifted, other) < 0.6 * distance(shifted, wave)


@pytest.mark.parametrize("octaves", [-1, 1])
def test_pitch_shift_without_phase_locking_is_torchaudios(octaves):
    """At an octave; at other shifts torchaudio's resampling takes 1 GB of filters."""
    rng = torch.Generator().manual_seed(0)
    waves, lengths = torch.zeros(2, 5000), torch.tensor([5000, 3217])
    for wave, length in zip(waves, lengths.tolist(), strict=True):
        wave[:length] = 0.1 * torch.randn(length, generator=rng)
    shifted, _ = PitchShift([12 * octaves], phase_locking=False)(waves, lengths, ["a", "b"])
    for found, wave, length in zip(shifted, waves, lengths.tolist(), strict=True):
        expected = torchaudio.functional.pitch_shift(wave[:length], 16000, 12 * octaves)
        torch.testing.assert_close(found[:length], expected, rtol=0, atol=1e-5)
        assert not found[length:].any()
    with pytest.raises(InputError, match="utterance of 256 samples"):
        alone(PitchShift([12], phase_locking=False), torch.ones(256))


@pytest.mark.parametrize("semitones", [-2, 2])
def test_pitch_shift_without_phase_locking_is_quieter(speech, semitones):
    for wave in speech:
        loss = -decibels(alone(PitchShift([semitones], phase_locking=False), wave), wave)
        assert 2 < loss < 5


def test_pitch_shift_of_a_batch_is_that_of_each_alone(speech):
    torch.manual_seed(3)
    parts = [*speech, torch.randn(401), torch.ones(1), tone(500, 9000), torch.randn(400)]
    parts = [*parts, torch.zeros(700), torch.cat([torch.zeros(3000), speech[0], torch.zeros(999)])]
    lengths = torch.tensor([len(part) for part in parts])
    waves = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    waves = waves + torch.randn(waves.shape) * (waves == 0) * (
        torch.arange(waves.size(1)) >= lengths[:, None]
    )  # noise beyond the lengths
    pitch, keys = PitchShift([-2, 0, 1, 2]), [str(b) for b in range(len(parts))]
    batch, batch_lengths = pitch(waves, lengths, keys)
    assert batch.shape == waves.shape and batch_lengths.equal(lengths)
    for out, part, key in zip(batch, parts, keys, strict=True):
        torch.testing.assert_close(out[: len(part)], alone(pitch, part, key), rtol=0, atol=1e-6)
        assert not out[len(part) :].any()


@pytest.mark.parametrize("semitones", [-12, -2, 2])
def test_silence_in_front_only_delays_the_pitch_shifted(speech, semitones):
    pitch = PitchShift([semitones])
    for wave in speech:
        silence = torch.zeros(256 * pitch.ratios[0].denominator)  # whole hops, before and after
        delayed = alone(pitch, torch.cat([silence, wave]))[len(silence) :]
        torch.testing.assert_close(delayed, alone(pitch, wave), rtol=0, atol=1e-6)


@pytest.mark.parametrize("semitones", [-12, -2, 2])
def test_pitch_shift_keeps_signs(semitones):
    pitch, noise = PitchShift([semitones]), torch.randn(3000)
    for silence in range(0, 1100, 50):  # frames that begin with more or less silence
        wave = F.pad(noise, (silence, 0))
        torch.testing.assert_close(alone(pitch, -wave), -alone(pitch, wave), rtol=0, atol=1e-6)


def test_pitch_shift_by_nothing_changes_nothing(speech):
    assert alone(PitchShift([0.0]), speech[0]).equal(speech[0])


@pytest.mark.parametrize("length", [1, 2, 400, 16000])
def test_pitch_shift_keeps_length_and_silence(length):
    assert not alone(PitchShift([2]), torch.zeros(length)).any()
    shifted = alone(PitchShift([-2]), tone(440, length) + 0.1)
    assert shifted.shape == (length,) and shifted.isfinite().all() and shifted.abs().max() < 1.5


def test_pitch_draws_depend_on_key_and_seed_alone():
    pitch, waves = PitchShift([-2, -1, 0, 1, 2]), tone(500, 800).expand(40, -1)
    lengths, keys = torch.full((40,), 800), [f"utt{i}" for i in range(40)]
    torch.manual_seed(1)
    first = pitch(waves, lengths, keys)[0]
    torch.rand(7)
    assert pitch(waves, lengths, keys[::-1])[0].flip(0).equal(first)
    assert len(first.unique(dim=0)) == 5
    torch.manual_seed(2)
    assert not pitch(waves, lengths, keys)[0].equal(first)


@pytest.mark.parametrize("semitones", [[], [12.5], [0, -13], [math.nan]])
def test_pitch_refuses_semitones(semitones):
    with pytest.raises(InputError, match=r"semitones must be one or more numbers in \[-12, 12\]"):
        PitchShift(semitones)


@pytest.fixture
def noise_scp(tmp_path) -> Path:
    """Recordings longer and shorter than the utterances, and one of a single sample."""
    folder = tmp_path / "noise files"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in {"long": 30000, "short": 3000, "sample": 1}.items():
        write_audio(folder / f"{name}.flac", rng.uniform(0.1, 0.6, size), 16000)
    write_table(folder / "wav.scp", {path.stem: path for path in folder.glob("*.flac")})
    return folder / "wav.scp"


def test_noise_is_a_looped_recording_at_the_snr_drawn(noise_scp):
    lengths = torch.tensor([8000, 1, 400, 7000] * 15)
    waves = torch.randn(60, 8000)
    keys = [str(b) for b in range(60)]
    noisy, noisy_lengths = AddNoise(noise_scp, [-5, 0.5, 20])(waves, lengths, keys)
    assert noisy.shape == waves.shape and noisy_lengths.equal(lengths)
    loops = {
        name: seamless(
            read_audio(str(noise_scp.with_name(f"{name}.flac")), 16000),
            round(FADE_SECONDS * 16000),
        )
        for name in ("long", "short", "sample")
    }
    seen = set()
    for clean, mix, length in zip(waves, noisy, lengths.tolist(), strict=True):
        assert not mix[length:].any()
        clean = clean[:length].double()
        noise = mix[:length].double() - clean
        snr = decibels(clean, noise)
        assert min(abs(snr - asked) for asked in (-5, 0.5, 20)) < 0.01
        if length < 400:
            continue
        found = []
        for name, loop in loops.items():
            tiled = np.tile(loop, 2 + length // len(loop))[: len(loop) + length].astype(float)
            pieces = np.lib.stride_tricks.sliding_window_view(tiled, length)[:-1]
            # The recording at every offset, by the angle between it and the noise.
            cosine = pieces[:, :400] @ noise[:400].numpy() / np.linalg.norm(pieces[:, :400], axis=1)
            offset = int(cosine.argmax())
            piece = pieces[offset]
            same = piece @ noise.numpy() / np.linalg.norm(piece) / noise.norm().item()
            found += [(name, round(snr, 1), offset)] * int(same > 1 - 1e-8)
        assert len(found) == 1
        seen.update(found)
    assert {name for name, _, _ in seen} == set(loops)
    assert {snr for _, snr, _ in seen} == {-5, 0.5, 20}
    assert len({offset // 3000 for name, _, offset in seen if name == "long"}) > 5


def test_noise_of_a_batch_is_that_of_each_alone(noise_scp):
    torch.manual_seed(3)
    parts = [torch.randn(length) for length in (5000, 1, 4000, 401, 400, 20000)]
    waves = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=3.0)
    lengths, keys = torch.tensor([len(part) for part in parts]), list("abcdef")
    add = AddNoise(noise_scp, [0, 5, 10])
    batch, _ = add(waves, lengths, keys)
    for out, part, key in zip(batch, parts, keys, strict=True):
        torch.testing.assert_close(out[: len(part)], alone(add, part, key), rtol=0, atol=1e-5)
        assert not out[len(part) :].any()
    torch.rand(7)
    assert add(waves.flip(0), lengths.flip(0), keys[::-1])[0].flip(0).equal(batch)
    torch.manual_seed(4)
    assert not add(waves, lengths, keys)[0].equal(batch)


def test_silence_and_silent_stretches_stay_finite(tmp_path, noise_scp):
    assert not alone(AddNoise(noise_scp, [5]), torch.zeros(1000)).any()
    burst = np.zeros(100000)
    burst[50000] = 0.5
    write_audio(tmp_path / "burst.flac", burst, 16000)
    write_table(tmp_path / "wav.scp", {"burst": tmp_path / "burst.flac"})
    speech = torch.randn(100)
    assert alone(AddNoise(tmp_path / "wav.scp", [5]), speech).equal(speech)


def test_noise_is_read_once_at_the_first_call(noise_scp):
    add = AddNoise(str(noise_scp), [5])
    copies = [copy.deepcopy(add), pickle.loads(pickle.dumps(add))]
    first = alone(add, torch.ones(5000))
    copies += [copy.deepcopy(add), pickle.loads(pickle.dumps(add))]
    for other in copies:
        assert alone(other, torch.ones(5000)).equal(first)
    for path in noise_scp.parent.iterdir():
        path.unlink()
    for other in (add, *copies):
        assert alone(other, torch.ones(5000)).equal(first)


@pytest.mark.parametrize("snrs", [[], [math.inf], [5, math.nan]])
def test_noise_refuses_snrs(snrs):
    with pytest.raises(InputError, match="snrs must be one or more finite numbers, in dB"):
        AddNoise("wav.scp", snrs)


def test_noise_refuses_recordings(tmp_path, noise_scp):
    def add(sampling_rate: int = 16000) -> None:
        alone(AddNoise(noise_scp, [5], sampling_rate), torch.ones(10))

    with pytest.raises(InputError, match=r"wav\.scp: noise long: .*16000 Hz, not 8000 Hz"):
        add(8000)
    write_audio(noise_scp.with_name("sample.flac"), np.zeros(5000), 16000)
    with pytest.raises(InputError, match=r"wav\.scp: noise sample: .*sample\.flac: silent"):
        add()
    noise_scp.unlink()
    with pytest.raises(InputError, match=r"wav\.scp: no such file"):
        add()


def test_perturbation_is_its_parts_in_order(noise_scp):
    torch.manual_seed(7)
    waves, lengths, keys = torch.randn(3, 6000), torch.tensor([6000, 450, 4000]), ["a", "b", "c"]
    perturb = Perturbation([0.9, 1.1], [-2, 2], (0.02, 0.05), noise_scp, [5, 10], hop=200)
    out, out_lengths = perturb(waves, lengths, keys)
    sped = SpeedPerturb([0.9, 1.1])(waves, lengths, keys)
    padded = ZeroPad(0.02, 0.05, 200)(*PitchShift([-2, 2])(*sped, keys), keys)[:2]
    expected, expected_lengths = AddNoise(noise_scp, [5, 10])(*padded, keys)
    assert out.equal(expected) and out_lengths.equal(expected_lengths)
    assert not out_lengths.equal(lengths)


def test_perturbation_of_an_empty_batch(noise_scp):
    perturb = Perturbation([0.9, 1.1], [-2, 2], (0.02, 0.05), noise_scp, [5, 10])
    out, lengths = perturb(torch.zeros(0, 500), torch.zeros(0, dtype=torch.long), [])
    assert len(out) == len(lengths) == 0


def test_empty_perturbation_changes_nothing():
    waves, lengths = torch.randn(2, 500), torch.tensor([500, 400])
    out, out_lengths = Perturbation()(waves, lengths, ["a", "b"])
    assert out.equal(waves) and out_lengths.equal(lengths)


@pytest.mark.parametrize(
    "options, keeps_length",
    [
        ({}, True),
        ({"speed": [1.0]}, True),
        ({"speed": [1.0, 1.1]}, False),
        ({"semitones": [-2, 2]}, True),
        ({"pad": (0.02, 0.05)}, False),
        ({"noise_scp": "wav.scp", "snrs": [5]}, True),
    ],
)
def test_perturbation_tells_whether_lengths_stay(options, keeps_length):
    assert Perturbation(**options).keeps_length is keeps_length


@pytest.mark.parametrize("options", [{"noise_scp": "wav.scp"}, {"snrs": [5]}])
def test_noise_and_snrs_come_together(options):
    with pytest.raises(InputError, match="noise_scp and snrs go together"):
        Perturbation(**options)


def test_perturbation_refuses_one_padding():
    with pytest.raises(InputError, match="pad must be two numbers"):
        Perturbation(pad=[0.1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_perturbation_on_a_gpu_is_that_on_the_cpu(noise_scp):
    waves, lengths, keys = torch.randn(3, 6000), torch.tensor([6000, 450, 4000]), ["a", "b", "c"]
    perturb = Perturbation([0.9, 1.1], [-2, 2], (0.02, 0.05), noise_scp, [5, 10])
    for device in ("cpu", "cuda", "cpu"):
        out, out_lengths = perturb(waves.to(device), lengths.to(device), keys)
        assert out.device.type == out_lengths.device.type == device
        if device == "cuda":
            on_gpu = out.cpu()
    torch.testing.assert_close(on_gpu, out, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: SpeedPerturb([0.9]), lambda: PitchShift([2])])
def test_padding_is_not_read(make):
    waves, lengths = tone(440, 4000).repeat(2, 1), torch.tensor([4000, 2500])
    expected, _ = make()(waves, lengths, ["a", "b"])
    waves[1, 2500:] = math.nan
    found, _ = make()(waves, lengths, ["a", "b"])
    assert torch.equal(found, expected)
