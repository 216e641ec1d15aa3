import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from posinv.errors import InputError
from posinv.ssl.s3prl import UpstreamExpert, register

pytestmark = pytest.mark.usefixtures("seeded")

LENGTHS = [4000, 5000, 1359, 4959]


def noise(samples):
    return 0.1 * torch.randn(samples)


def alone(folder, wave):
    """The oracle: transformers' hidden states of one waveform, through its own preprocessing."""
    values = AutoFeatureExtractor.from_pretrained(folder)(
        wave.numpy(), sampling_rate=16000, return_tensors="pt"
    )
    if "input_features" in values:  # the last pair may have one filter bank alone
        inputs = values["input_features"][:, : values["attention_mask"].sum()]
    else:
        inputs = values["input_values"]
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(inputs, output_hidden_states=True)


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


def test_each_waveform_has_transformers_features_of_it_alone(folders, family):
    expert = UpstreamExpert(folders / family, model_config=None, refresh=False).eval()
    rate = expert.get_downsample_rates("hidden_states")
    assert rate == {"sew": 640, "sew-odd": 960}.get(family, 320)
    waves = [noise(length) for length in LENGTHS]
    with torch.no_grad():
        features = expert(waves)
    states = features["hidden_states"]
    assert isinstance(states, list) and features["last_hidden_state"] is states[-1]
    for row, wave in enumerate(waves):
        expected = alone(folders / family, wave).hidden_states
        assert len(states) == len(expected)
        for state, of_one in zip(states, expected, strict=True):
            assert state.shape == (len(waves), math.ceil(5000 / rate), 32)
            frames = of_one.shape[1]
            assert_near(state[row, :frames], of_one[0])
            assert (state[row, frames:] == state[row, frames - 1]).all()


def test_a_batch_gives_s3prl_what_its_waveforms_give(folders, family):
    """S3PRL takes T / rate frames, rounded up or to the nearest: some after the last frame."""
    expert = UpstreamExpert(folders / family).eval()
    rate = expert.get_downsample_rates()
    waves = [noise(length) for length in LENGTHS]
    with torch.no_grad():
        together = expert(waves)["hidden_states"]
        for row, wave in enumerate(waves):
            of_one = expert([wave])["hidden_states"]
            taken = math.ceil(len(wave) / rate)
            for state, expected in zip(together, of_one, strict=True):
                assert expected.shape[1] == taken
                assert_near(state[row, :taken], expected[0])


def test_can_be_trained_as_s3prl_does(folders):
    expert = UpstreamExpert(folders / "hubert-base").train()
    expert([torch.randn(4000), torch.randn(2000)])["hidden_states"][-1].square().sum().backward()
    trained = [p for p in expert.parameters() if p.requires_grad]
    assert len(trained) > 30 and all(p.grad.abs().sum() > 0 for p in trained if p.grad is not None)
    assert sum(p.grad is not None for p in trained) == len(trained)


def test_refusals(folders, tmp_path):
    with pytest.raises(InputError, match="none"):
        UpstreamExpert(str(tmp_path / "none"))
    with pytest.raises(InputError, match="utterance 1 of the batch has 300 samples"):
        UpstreamExpert(folders / "hubert-base")([torch.randn(4000), torch.randn(300)])


def test_s3prl_is_not_imported(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3prl", None)
    assert UpstreamExpert(folders / "wavlm-base")


def test_register_puts_stand_ins_only_where_something_is_gone(monkeypatch):
    """A fake S3PRL has the same imports as S3PRL 0.4.18."""
    torchaudio, huggingface_hub = ModuleType("torchaudio"), ModuleType("huggingface_hub")
    torchaudio.set_audio_backend = huggingface_hub.HfFolder = object()
    before = torchaudio.set_audio_backend
    hub = ModuleType("s3prl.hub")
    monkeypatch.delitem(sys.modules, "torchaudio.sox_effects", raising=False)
    for module in (torchaudio, huggingface_hub, ModuleType("s3prl"), hub):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register()
    assert hub.posinv is UpstreamExpert
    assert torchaudio.set_audio_backend is huggingface_hub.HfFolder is before
    assert huggingface_hub.Repository is None
    assert importlib.import_module("torchaudio.sox_effects").apply_effects_tensor is None
    monkeypatch.delitem(sys.modules, "torchaudio.sox_effects")


@pytest.fixture(scope="module")
def s3prl():
    if importlib.util.find_spec("s3prl") is None:
        pytest.skip("s3prl is not installed")
    register()
    return importlib.import_module("s3prl.nn")


def test_with_s3prl(s3prl, folders, family):
    """S3PRL's own class, as the card says."""
    model = s3prl.S3PRLUpstream("posinv", str(folders / family)).eval()
    rate = UpstreamExpert(folders / family).get_downsample_rates()
    assert model.num_layers == 4 and model.downsample_rates == 4 * [rate]
    assert model.hidden_sizes == 4 * [32]
    waves, lengths = 0.1 * torch.randn(3, 5000), torch.tensor([5000, 4000, 1359])
    with torch.no_grad():
        hidden, frames = model(waves, lengths)
        for row, length in enumerate(lengths):
            expected = alone(folders / family, waves[row, :length]).hidden_states
            for state, state_frames, of_one in zip(hidden, frames, expected, strict=True):
                count = of_one.shape[1]
                assert state_frames[row] == math.ceil(length / rate) >= count
                assert_near(state[row, :count], of_one[0])


def test_with_s3prls_runner(s3prl, folders, family):
    """The weighted sum that run_downstream.py trains: a batch gives what its waveforms give."""
    featurizer_class = importlib.import_module("s3prl.upstream.interfaces").Featurizer
    expert = UpstreamExpert(folders / family, model_config=None, refresh=False)
    featurizer = featurizer_class(expert, "hidden_states", upstream_device="cpu")
    waves = [noise(length) for length in LENGTHS]
    with torch.no_grad():
        for wave, feature in zip(waves, featurizer(waves, expert(waves)), strict=True):
            [of_one] = featurizer([wave], expert([wave]))
            assert len(feature) == round(len(wave) / expert.get_downsample_rates())
            assert_near(feature, of_one)
