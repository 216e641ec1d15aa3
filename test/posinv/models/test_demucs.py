import math
from functools import cache

import pytest
import torch
from espnet2.enh.decoder.null_decoder import NullDecoder
from espnet2.enh.encoder.null_encoder import NullEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from posinv.errors import InputError
from posinv.espnet.separator import DemucsSeparator
from posinv.models.demucs import INIT_STD
from posinv.models.demucs_stream import DemucsStream

CONFIGS = [
    {"hidden": 4, "depth": 3, "stride": 4, "resample": 1, "causal": True},
    {"hidden": 4, "depth": 3, "stride": 4, "resample": 1, "causal": False},
    {"hidden": 6, "depth": 2, "stride": 4, "resample": 2, "causal": True},
    {"hidden": 4, "depth": 3, "stride": 2, "resample": 2, "causal": False},  # valentini_nc's
    {"hidden": 4, "depth": 5, "stride": 4, "resample": 4, "causal": True},  # the others'
    {"hidden": 5, "depth": 2, "stride": 2, "resample": 4, "causal": False},
    {"hidden": 1, "depth": 1, "stride": 8, "resample": 1, "causal": True},
    {"hidden": 3, "depth": 2, "stride": 3, "resample": 4, "causal": False},
]

pytestmark = pytest.mark.usefixtures("seeded")


def config_id(config: dict) -> str:
    return "-".join(f"{key}{value}" for key, value in config.items())


def oracle_class():
    return pytest.importorskip(
        "denoiser.demucs", reason="the oracle, denoiser==0.1.5, is not installed"
    ).Demucs


@cache
def pair(index: int):
    """The oracle, and our model with its weights. Biases are above 0, so padding would show."""
    torch.manual_seed(index)
    config = CONFIGS[index]
    oracle = oracle_class()(**config)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("bias"):
                parameter += 0.2 * torch.rand_like(parameter)
    ours = DemucsSeparator(1, **config)
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=map(config_id, CONFIGS))
class TestAgainstRelease:
    @pytest.mark.parametrize("samples", [2, 3, 57, 1000, 4001])
    def test_one_utterance(self, index, samples):
        oracle, ours = pair(index)
        wave = noise(1, samples)
        (enhanced,), lengths, others = ours(wave, torch.tensor([samples]))
        expected = oracle(wave).squeeze(1)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(enhanced, expected, rtol=0, atol=1e-5)
        assert lengths.tolist() == [samples]
        assert not others

    def test_batch_is_its_utterances(self, index):
        oracle, ours = pair(index)
        lengths = [521, 1200, 2, 850, 1199]
        wave = noise(len(lengths), 1230, seed=1)  # noise in the padding, too
        weights = noise(len(lengths), 1230, seed=2)
        batch = wave.clone().requires_grad_()
        ours.zero_grad()
        (enhanced,), _, _ = ours(batch, torch.tensor(lengths))
        (enhanced * weights).sum().backward()

        oracle.zero_grad()
        for row, length in enumerate(lengths):
            alone = wave[row : row + 1, :length].clone().requires_grad_()
            expected = oracle(alone).squeeze(1)
            (expected * weights[row, :length]).sum().backward()
            torch.testing.assert_close(
                enhanced[row, :length], expected[0], rtol=0, atol=1e-5, msg=f"utterance {row}"
            )
            assert_near(batch.grad[row, :length], alone.grad[0])
            assert not enhanced[row, length:].any()
            assert not batch.grad[row, length:].any()
        expected_gradients = gradients(oracle)
        for name, gradient in gradients(ours).items():
            error = (gradient - expected_gradients[name]).norm()
            assert error < 1e-4 * expected_gradients[name].norm(), name


@settings(max_examples=25, deadline=None)
@given(
    index=st.integers(0, len(CONFIGS) - 1),
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    extra=st.integers(0, 20),
)
def test_batch_is_its_utterances_at_any_lengths(index, lengths, extra):
    torch.manual_seed(index)
    separator = DemucsSeparator(1, **CONFIGS[index])
    wave = noise(len(lengths), max(lengths) + extra)
    with torch.no_grad():
        (batch,), _, _ = separator(wave, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            (alone,), _, _ = separator(wave[row : row + 1, :length], torch.tensor([length]))
            torch.testing.assert_close(batch[row, :length], alone[0], rtol=0, atol=1e-5)
            assert not batch[row, length:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_one_sample_and_silence(causal):
    separator = DemucsSeparator(1, hidden=4, depth=2, resample=4, causal=causal)
    wave = torch.zeros(3, 800)
    wave[0, 0] = 0.5  # one sample
    wave[2] = noise(1, 800)[0]  # row 1 is silence
    wave.requires_grad_()
    (enhanced,), _, _ = separator(wave, torch.tensor([1, 800, 800]))
    assert not enhanced[:2].any()  # their standard deviation is 0
    assert enhanced[2].abs().max() > 0
    enhanced.square().sum().backward()
    assert wave.grad.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(separator).values())


def test_resample_4_is_2_twice_and_a_tone_survives_it():
    separator = DemucsSeparator(1, hidden=2, depth=1, resample=2)
    time = torch.arange(2000, dtype=torch.float64)
    separator.double()
    tone = torch.sin(2 * math.pi * 0.1 * time)[None]
    twice = separator._upsample(separator._upsample(tone))
    expected = torch.sin(2 * math.pi * 0.1 * torch.arange(8000, dtype=torch.float64) / 4)[None]
    middle = slice(1000, 7000)  # the zeros outside affect the ends
    torch.testing.assert_close(twice[:, middle], expected[:, middle], rtol=0, atol=1e-5)
    back = separator._downsample(separator._downsample(twice))
    torch.testing.assert_close(back[:, 250:1750], tone[:, 250:1750], rtol=0, atol=1e-5)

    resample = pytest.importorskip("denoiser.resample")
    release = resample.upsample2(resample.upsample2(tone))
    torch.testing.assert_close(twice, release, rtol=0, atol=1e-6)
    for odd_or_even in (tone, tone[:, 1:]):
        torch.testing.assert_close(
            separator._downsample(odd_or_even),
            resample.downsample2(odd_or_even),
            rtol=0,
            atol=1e-6,
        )


def test_initial_convolutions_are_rescaled():
    torch.manual_seed(0)
    separator = DemucsSeparator(1, hidden=32, depth=3)
    convolutions = [m for m in separator.modules() if isinstance(m, nn.Conv1d)]
    assert len(convolutions) == 9
    for convolution in convolutions:
        weight = convolution.weight
        drawn = 1 / math.sqrt(3 * weight[0].numel())  # uniform in ±1/sqrt(fan-in)
        assert weight.std().item() == pytest.approx(math.sqrt(drawn * INIT_STD), rel=0.1)


def test_espnet_same_encoder_and_decoder():
    encoder, decoder = NullEncoder(), NullDecoder()
    separator = DemucsSeparator(encoder.output_dim, hidden=2, depth=2, resample=1)
    assert separator.num_spk == 1
    lengths = torch.tensor([500, 300])
    feature, feature_lengths = encoder(noise(2, 500), lengths)
    (wave,), _, _ = separator(feature, feature_lengths, None)
    assert decoder(wave, lengths)[0].shape == (2, 500)


class TestCheckpoint:
    CONFIG = CONFIGS[3]

    def state(self):
        torch.manual_seed(5)
        return DemucsSeparator(1, **self.CONFIG).state_dict()

    def assert_loads(self, path):
        torch.manual_seed(6)
        loaded = DemucsSeparator(1, **self.CONFIG, checkpoint=path).state_dict()
        assert loaded.keys() == self.state().keys()
        assert all(torch.equal(loaded[key], value) for key, value in self.state().items())

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"args": (), "kwargs": {"hidden": 4}, "state": state},
            lambda state: {"model": {"kwargs": {}, "state": None}, "best_state": state},
        ],
        ids=["bare", "best.th", "best_state"],
    )
    def test_bare_and_wrapped(self, tmp_path, wrap):
        path = tmp_path / "with spaces.th"
        torch.save(wrap(self.state()), path)
        self.assert_loads(path)

    def test_package_that_the_release_writes(self, tmp_path):
        from_release = oracle_class()(**self.CONFIG)
        from_release.load_state_dict(self.state())
        serialize = pytest.importorskip("denoiser.utils").serialize_model
        torch.save(serialize(from_release), tmp_path / "best.th")
        self.assert_loads(tmp_path / "best.th")

    def test_released_keys(self):
        oracle = oracle_class()(**self.CONFIG)
        ours = DemucsSeparator(1, **self.CONFIG)
        assert oracle.state_dict().keys() == ours.state_dict().keys()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden": 8}, r"encoder\.0\.0\.weight is \(4, 1, 8\) in the file but \(8, 1, 8\)"),
            ({"depth": 4}, r"encoder\.3\.0\.weight is absent in the file but \(32, 16, 8\)"),
            ({"depth": 2}, r"lstm\.lstm\.weight_ih_l0 is \(64, 16\) in the file but \(32, 8\) in"),
            (
                {"causal": True},
                r"lstm\.lstm\.weight_ih_l1 is \(64, 32\) in the file but \(64, 16\)",
            ),
        ],
    )
    def test_other_shape(self, tmp_path, change, message):
        path = tmp_path / "release.th"
        torch.save(self.state(), path)
        with pytest.raises(InputError, match=message) as error:
            DemucsSeparator(1, **(self.CONFIG | change), checkpoint=path)
        assert str(error.value).startswith(f"{path}: ")
        assert str(error.value).endswith("hidden=4, depth=3, causal=False")

    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"no\.th: No such file"):
            DemucsSeparator(1, checkpoint=tmp_path / "no.th")

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken", b"\x80\x02"])
    def test_not_a_checkpoint(self, tmp_path, content):
        path = tmp_path / "text.th"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"text\.th: not (a checkpoint that|tensors alone)"):
            DemucsSeparator(1, checkpoint=path)

    def test_python_objects(self, tmp_path):
        path = tmp_path / "checkpoint.th"
        torch.save({"args": pytest.approx(1.0), "best_state": self.state()}, path)
        with pytest.raises(InputError, match=r"checkpoint\.th: not tensors alone"):
            DemucsSeparator(1, checkpoint=path)

    @pytest.mark.parametrize("content", [torch.zeros(3), {"separator.lstm": torch.zeros(3)}])
    def test_another_models_state(self, tmp_path, content):
        path = tmp_path / "other.th"
        torch.save(content, path)
        with pytest.raises(InputError, match=r"other\.th: not (the|a) state dict"):
            DemucsSeparator(1, checkpoint=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_spk": 2}, "num_spk is 2"),
        ({"input_dim": 257}, "input_dim is 257"),
        ({"hidden": 0}, "hidden is 0"),
        ({"depth": 0}, "depth 0"),
        ({"stride": 9}, "stride is 9"),
        ({"resample": 3}, "resample is 3"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        DemucsSeparator(**({"input_dim": 1} | options))


def test_channels_are_refused():
    separator = DemucsSeparator(1, hidden=2, depth=1)
    with pytest.raises(InputError, match=r"\(1, 100, 2\)"):
        separator(torch.zeros(1, 100, 2), torch.tensor([100]))


def test_forward_streaming_is_the_stream():
    separator = DemucsSeparator(1, hidden=3, depth=3, resample=2)
    wave, states, chunks = noise(2, 2000), None, []
    for chunk in wave.split(150, dim=1):
        (enhanced,), states, others = separator.forward_streaming(chunk, states)
        chunks.append(enhanced)
        assert not others
    actual = torch.cat([*chunks, states.flush()], 1)
    stream = DemucsStream(separator, batch=2)
    expected = torch.cat([stream(wave), stream.flush()], 1)
    assert actual.shape == wave.shape and expected.abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="it is not causal"):
        DemucsSeparator(1, hidden=2, depth=1, causal=False).forward_streaming(wave)


def test_the_stream_is_nearer_to_the_whole_than_the_releases():
    """The release's streamer resamples each frame with a short look-ahead of its own."""
    streamer = pytest.importorskip("denoiser.demucs").DemucsStreamer
    oracle, ours = pair(4)
    wave = noise(1, 16000)
    with torch.no_grad():
        expected = oracle(wave).squeeze(1)
        theirs = streamer(oracle)
        released = torch.cat([theirs.feed(wave), theirs.flush()], 1)
    stream = DemucsStream(ours, level=wave.std().item())
    actual = torch.cat([stream(wave), stream.flush()], 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert (released - expected).norm() > 1000 * (actual - expected).norm()
