import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.errors import InputError
from posinv.models import demucs
from posinv.models.demucs import Demucs
from posinv.models.demucs_stream import DemucsStream, RunningLevel

CONFIGS = [
    {"hidden": 3, "depth": 5, "stride": 4, "resample": 4},  # the released causal models'
    {"hidden": 4, "depth": 3, "stride": 4, "resample": 1},
    {"hidden": 4, "depth": 2, "stride": 2, "resample": 2},
    {"hidden": 2, "depth": 3, "stride": 3, "resample": 4},
    {"hidden": 2, "depth": 1, "stride": 8, "resample": 1},
    {"hidden": 2, "depth": 2, "stride": 1, "resample": 2},
]
RELEASED = CONFIGS[0]

pytestmark = pytest.mark.usefixtures("seeded")


def make(config, dtype=torch.float64):
    """A model with biases, so that what is padded or left out would show."""
    torch.manual_seed(3)
    model = Demucs(**config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.2 * torch.rand_like(parameter)
    return model


def noise(batch, samples, dtype=torch.float64):
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)).to(dtype)


def whole(model, wave):
    with torch.no_grad():
        return model(wave, torch.full((len(wave),), wave.shape[1]))


def streamed(stream, wave, sizes):
    """Feed chunks of the sizes, cycled; return the chunks that come."""
    chunks = []
    start = 0
    while start < wave.shape[1]:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(stream(wave[:, start : start + size]))
        start += size
    return [*chunks, stream.flush()]


def assert_close(actual, expected, tolerance=1e-10):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("samples", [2, 7, 300, 2001])
def test_is_the_whole_recording_at_its_level(config, samples):
    model, wave = make(config), noise(1, samples)
    stream = DemucsStream(model, level=wave.std().item())
    assert_close(torch.cat(streamed(stream, wave, [100, 1, 0, 37, 800]), 1), whole(model, wave))


def test_float32_is_near():
    model, wave = make(RELEASED, torch.float32), noise(1, 16000, torch.float32)
    stream = DemucsStream(model, level=wave.std().item())
    expected = whole(model, wave)
    actual = torch.cat(streamed(stream, wave, [256]), 1)
    assert_close(actual, expected, 1e-5 * expected.abs().max().item())


@settings(max_examples=25, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    samples=st.integers(1, 1500),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6).filter(any),
    batch=st.integers(1, 3),
)
def test_chunks_of_any_sizes(config, samples, sizes, batch):
    model, wave = make(config), noise(batch, samples)
    stream = DemucsStream(model, level=0.1, batch=batch)
    at_once = DemucsStream(model, level=0.1, batch=batch)
    actual = torch.cat(streamed(stream, wave, sizes), 1)
    assert actual.shape == wave.shape
    assert_close(actual, torch.cat([at_once(wave), at_once.flush()], 1))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_sample_at_a_time_and_the_latency_is_kept(config):
    model, wave = make(config), noise(1, 1100)
    stream = DemucsStream(model, level=0.1)
    given, waits = 0, []
    chunks = []
    for n in range(wave.shape[1]):
        chunks.append(stream(wave[:, n : n + 1]))
        waits += [n - sample for sample in range(given, given + chunks[-1].shape[1])]
        given += chunks[-1].shape[1]
    assert max(waits) == stream.latency
    at_once = DemucsStream(model, level=0.1)
    assert_close(
        torch.cat([*chunks, stream.flush()], 1), torch.cat([at_once(wave), at_once.flush()], 1)
    )


def test_latency_of_the_released_models():
    stream = DemucsStream(make(RELEASED))
    assert stream.latency == 763  # 47.7 ms, as docstrings and README say
    chunk = stream(torch.zeros(1, 4096, dtype=torch.float64))
    more = stream(torch.zeros(1, 256, dtype=torch.float64))
    assert chunk.shape[1] >= 4096 - 764 and more.shape[1] == 256


@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_no_sample_waits_for_less_than_it_depends_on(config):
    """The last input sample that an output sample of the whole recording depends on."""
    model = make(config)
    wave = noise(1, 1800).requires_grad_()
    stream = DemucsStream(model, level=0.1)
    normalised = wave / (0.1 + demucs.FLOOR)
    # At a fixed level: forward divides by a standard deviation that depends on all samples.
    model_out = _at_levels(model, normalised)
    furthest = 0
    for sample in range(500, 500 + 260, 13):
        [gradient] = torch.autograd.grad(model_out[0, sample], wave, retain_graph=True)
        furthest = max(furthest, gradient[0].nonzero().max().item() - sample)
    # The steps of 13 may miss the sample that waits longest.
    assert stream.latency - 16 <= furthest <= stream.latency


def _at_levels(model, wave, levels=1.0):
    """The oracle: the network on a whole recording, normalised by given levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demucs, "_std", lambda wave, lengths: levels)
        patch.setattr(demucs, "FLOOR", 0.0)
        return model(wave, torch.full((len(wave),), wave.shape[1]))


@pytest.mark.parametrize("heard_level", [None, 0.05])
def test_running_level_is_the_network_at_these_levels(heard_level):
    model, wave = make(RELEASED), noise(2, 3000)
    wave[0, :500] *= 0.01
    levels = RunningLevel(batch=2)(wave)
    floor = demucs.FLOOR if heard_level is None else demucs.FLOOR * levels / heard_level
    with torch.no_grad():
        expected = _at_levels(model, wave * levels / (levels + floor), levels)
    stream = DemucsStream(model, batch=2, heard_level=heard_level)
    assert_close(torch.cat(streamed(stream, wave, [160, 1, 400]), 1), expected)


def test_running_level_of_a_steady_signal_comes_near_the_whole():
    model, wave = make(RELEASED), noise(1, 32000)
    actual = torch.cat(streamed(DemucsStream(model), wave, [1000]), 1)
    expected = whole(model, wave)
    error = (actual - expected)[:, 16000:].norm() / expected[:, 16000:].norm()
    assert error < 0.03
    assert (actual - expected)[:, :16000].norm() > (actual - expected)[:, 16000:].norm()


def test_a_batch_is_its_signals():
    model, wave = make(RELEASED), noise(3, 1500) * torch.tensor([[1.0], [0.01], [0.0]])
    together = torch.cat(streamed(DemucsStream(model, batch=3), wave, [200]), 1)
    for row in range(3):
        alone = torch.cat(streamed(DemucsStream(model), wave[row : row + 1], [200]), 1)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("heard_level", [None, 0.05])
def test_silence(heard_level):
    """Silence is silence, as of the whole recording, whose standard deviation is 0."""
    model, wave = make(RELEASED), torch.zeros(1, 2500, dtype=torch.float64)
    out = torch.cat(streamed(DemucsStream(model, heard_level=heard_level), wave, [300]), 1)
    assert out.shape == wave.shape and not out.any() and not whole(model, wave).any()
    wave[:, 1200:] = noise(1, 1300)  # speech after silence
    stream = DemucsStream(model, heard_level=heard_level)
    out = torch.cat(streamed(stream, wave, [300]), 1)
    assert out.isfinite().all() and not out[:, :1200].any() and out[:, 1200:].any()


@pytest.mark.parametrize("samples", [1, 5, 400, 680])
def test_shorter_than_the_latency(samples):
    model, wave = make(RELEASED), noise(1, samples)
    level = wave.std().item() if samples > 1 else 0.1
    stream = DemucsStream(model, level=level)
    assert stream(wave).shape == (1, 0)
    out = stream.flush()
    assert out.shape == wave.shape
    if samples > 1:
        assert_close(out, whole(model, wave))


def test_no_samples():
    stream = DemucsStream(make(RELEASED), batch=2)
    assert stream(torch.zeros(2, 0, dtype=torch.float64)).shape == (2, 0)
    assert stream.flush().shape == (2, 0)


def held_bytes(thing, seen):
    """Bytes of the storages that an object holds, but for the model's."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, torch.nn.Module):
        return 0
    if isinstance(thing, list | tuple):
        return sum(held_bytes(item, seen) for item in thing)
    return sum(held_bytes(item, seen) for item in getattr(thing, "__dict__", {}).values())


@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_memory_is_flat(config):
    stream = DemucsStream(make(config))
    wave = noise(1, 2048)
    stream(wave)
    early = held_bytes(stream, set())
    assert early > 1000
    for _ in range(8):
        stream(wave)
        assert held_bytes(stream, set()) == early
    assert early < 3e6


def test_no_gradient_is_kept():
    stream = DemucsStream(make(RELEASED))
    assert not stream(noise(1, 2000).requires_grad_()).requires_grad


class TestRunningLevel:
    def test_is_the_weighted_root_mean_square(self):
        wave, memory = noise(2, 300), 50
        level = RunningLevel(2, memory)
        actual = torch.cat([level(part) for part in wave.split([1, 70, 129, 100], dim=1)], 1)
        for n in range(300):
            weights = np.exp(-(n - np.arange(n + 1)) / memory)
            expected = np.sqrt(weights @ wave[:, : n + 1].T.numpy() ** 2 / weights.sum())
            np.testing.assert_allclose(actual[:, n], expected, rtol=1e-12)

    def test_a_first_sample_and_silence(self):
        assert RunningLevel()(torch.tensor([[-0.5]])).item() == pytest.approx(0.5)
        assert not RunningLevel()(torch.zeros(1, 9)).any()

    def test_old_loudness_fades(self):
        level = RunningLevel(memory=100)
        level(torch.full((1, 1000), 1.0))
        assert level(torch.full((1, 1000), 0.1))[0, -1].item() == pytest.approx(0.1, rel=0.01)


class TestRefusals:
    def test_not_causal(self):
        with pytest.raises(InputError, match="it is not causal"):
            DemucsStream(make({**RELEASED, "causal": False}))

    @pytest.mark.parametrize("level", [0.0, -1.0, math.inf, math.nan])
    def test_level(self, level):
        with pytest.raises(InputError, match=r"level of a stream: .*, must be a number above 0"):
            DemucsStream(make(RELEASED), level=level)

    def test_ended(self):
        stream = DemucsStream(make(RELEASED))
        stream.flush()
        with pytest.raises(InputError, match="has ended"):
            stream(noise(1, 3))
        with pytest.raises(InputError, match="has ended"):
            stream.flush()

    @pytest.mark.parametrize(
        "chunk", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(1, 3).int()]
    )
    def test_shape_and_type(self, chunk):
        with pytest.raises(InputError, match=r"chunk of a stream: .* expected torch\.float64 of"):
            DemucsStream(make(RELEASED))(chunk)
