import math

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.errors import InputError
from posinv.perturb import SpeedPerturb, ZeroPad, random_state


def tone(frequency: float, length: int) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(length) / 16000)


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
        # Level kept, away from the edges.
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


def test_draws_depend_on_key_and_seed_alone():
    speed, lengths = SpeedPerturb([0.8, 0.9, 1.0, 1.1, 1.2]), torch.full((40,), 1000)
    keys = [f"utt{i}" for i in range(40)]

    def draw(keys):
        return dict(zip(keys, speed(torch.zeros(40, 1000), lengths, keys)[1].tolist(), strict=True))

    torch.manual_seed(1)
    first = draw(keys)
    torch.rand(7)  # what was drawn before doesn't matter
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
