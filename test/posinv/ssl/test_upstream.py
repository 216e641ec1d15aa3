import copy
import json
import logging
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ssl import TINY_SSL
from transformers import (
    AutoModel,
    BertConfig,
    Data2VecAudioConfig,
    HubertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from posinv.errors import InputError
from posinv.ssl import exact, load
from posinv.ssl.load import load_config
from posinv.ssl.upstream import Frozen, SSLUpstream

TINY = {**TINY_SSL, "num_hidden_layers": 3}
GROUP = {"feat_extract_norm": "group"}
LAYER = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
FAMILIES = {
    "hubert-base": HubertConfig(**TINY, **GROUP),
    "hubert-large": HubertConfig(**TINY, **LAYER),
    "hubert-batchnorm": HubertConfig(**TINY, **GROUP, conv_pos_batch_norm=True),
    "wavlm-base": WavLMConfig(**TINY, **GROUP),
    "wavlm-large": WavLMConfig(**TINY, **LAYER),
    "wav2vec2-base": Wav2Vec2Config(**TINY, **GROUP),
    "wav2vec2-large": Wav2Vec2Config(**TINY, **LAYER),
    "data2vec": Data2VecAudioConfig(
        **{**TINY, "num_conv_pos_embeddings": 3}, conv_pos_kernel_size=7
    ),
}


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@pytest.fixture(autouse=True)
def seeded():
    """One seed, and one thread: models this small only wait for a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per family: weights away from their initial values, so that every bias counts."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    for name, config in FAMILIES.items():
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        model.save_pretrained(root / name)
        Wav2Vec2FeatureExtractor(do_normalize="large" in name).save_pretrained(root / name)
    return root


def batch(lengths, scale=1.0):
    """Waves whose padding is not zero: it must not be read."""
    waves = scale * torch.randn(len(lengths), max(lengths) + 37)
    return waves, torch.tensor(lengths)


def alone(folder, wave):
    """The oracle: transformers and its feature extractor on one utterance."""
    model = AutoModel.from_pretrained(folder).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    values = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        return torch.stack(model(values, output_hidden_states=True).hidden_states)[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_gives_what_transformers_gives_alone(folders, name):
    waves, lengths = batch([16000, 400, 7777, 719, 720, 23456], scale=0.1)
    waves += 0.05
    ssl = SSLUpstream(folders / name)
    with torch.no_grad():
        hidden, frames = ssl(waves, lengths)
    assert hidden.shape == (ssl.num_layers, 6, frames.max(), ssl.output_size)
    assert frames.tolist() == [(n - 400) // 320 + 1 for n in lengths.tolist()]
    for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
        reference = alone(folders / name, waves[i, :n])
        assert hidden[:, i, :m].shape == reference.shape
        for value, expected in zip(hidden[:, i, :m], reference, strict=True):
            assert relative_error(value, expected) < 1e-5
        assert not hidden[:, i, m:].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_wrt_waveform_is_the_lone_utterances(folders, name):
    waves, lengths = batch([6000, 400, 3217])
    ssl = SSLUpstream(folders / name)
    waves.requires_grad_()
    hidden, frames = ssl(waves, lengths)
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
        wave = waves[i : i + 1, :n].detach().requires_grad_()
        values = wave
        if ssl.normalize:
            values = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        states = torch.stack(ssl.model(values, output_hidden_states=True).hidden_states)
        (states[:, 0] * weights[:, i, :m]).sum().backward()
        assert relative_error(waves.grad[i, :n], wave.grad[0]) < 1e-4
        assert not waves.grad[i, n:].any()


@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_thirty_seconds_beside_one_frame(folders, name):
    waves, lengths = batch([400, 480000])
    with torch.no_grad():
        hidden, frames = SSLUpstream(folders / name)(waves, lengths)
    for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
        assert relative_error(hidden[:, i, :m], alone(folders / name, waves[i, :n])) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("frames", [1, 3])
def test_pieces_of_long_audio_have_no_seams(folders, name, frames, monkeypatch):
    monkeypatch.setattr(exact, "_PIECE_BYTES", frames * 64 * 4 * TINY["conv_dim"][0])
    waves, lengths = batch([400, 720, 1359, 1360, 16000], scale=0.1)
    waves += 0.05
    ssl = SSLUpstream(folders / name)
    with torch.no_grad():
        hidden, _ = ssl(waves, lengths)
    for i, n in enumerate(lengths):
        reference = alone(folders / name, waves[i, :n])
        assert relative_error(hidden[:, i, : reference.size(1)], reference) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_silence(folders, name):
    waves, lengths = batch([5000, 8000])
    waves[0] = 0.0
    with torch.no_grad():
        hidden, frames = SSLUpstream(folders / name)(waves, lengths)
    expected = alone(folders / name, waves[0, :5000])
    assert relative_error(hidden[:, 0, : frames[0]], expected) < 1e-5


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(400, 9000), min_size=1, max_size=5))
def test_any_lengths(folders, lengths):
    ssl = SSLUpstream(folders / "hubert-base")
    waves, lengths = batch(lengths)
    with torch.no_grad():
        hidden, frames = ssl(waves, lengths)
        for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
            expected = torch.stack(
                ssl.model(waves[i : i + 1, :n], output_hidden_states=True).hidden_states
            )
            assert relative_error(hidden[:, i, :m], expected[:, 0]) < 1e-5


def test_full_size_hubert_base(tmp_path):
    HubertConfig().save_pretrained(tmp_path)
    ssl = SSLUpstream(tmp_path, random_init=True)
    assert (ssl.num_layers, ssl.output_size, ssl.hop, ssl.min_samples) == (13, 768, 320, 400)
    waves, lengths = batch([8000, 48000])  # a piece, and more
    with torch.no_grad():
        hidden, frames = ssl(waves, lengths)
        for i, (n, m) in enumerate(zip(lengths, frames, strict=True)):
            expected = torch.stack(
                ssl.model(waves[i : i + 1, :n], output_hidden_states=True).hidden_states
            )
            assert relative_error(hidden[:, i, :m], expected[:, 0]) < 1e-5


def test_the_model_is_left_as_it_was(folders):
    """What extract() overrides for a call is back after it, so deepcopy and saving are safe."""
    ssl = SSLUpstream(folders / "hubert-base", trainable=["encoder.*"])
    before = ssl.config.to_dict()
    ssl.train()
    ssl(*batch([4000, 5000]))
    assert ssl.config.to_dict() == before
    norm = ssl.model.feature_extractor.conv_layers[0].layer_norm
    assert type(norm) is torch.nn.GroupNorm and "forward" not in vars(norm)
    convs = [m for m in ssl.modules() if isinstance(m, torch.nn.Conv1d)]
    assert not any(conv._forward_pre_hooks for conv in convs)
    clone = copy.deepcopy(ssl).eval()
    waves, lengths = batch([4000, 5000])
    torch.testing.assert_close(clone(waves, lengths), ssl.eval()(waves, lengths), rtol=0, atol=0)


def test_no_layer_drop_nor_spec_augment_in_training(folders):
    ssl = SSLUpstream(folders / "hubert-base", trainable=["*"])
    ssl.config.layerdrop = 1.0
    ssl.config.mask_time_prob = 0.9
    ssl.config.mask_feature_prob = 0.9
    for module in ssl.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    waves, lengths = batch([8000, 5000])
    trained = ssl.train()(waves, lengths)[0]
    torch.testing.assert_close(trained, ssl.eval()(waves, lengths)[0])


def test_frame_lengths_match_transformers(folders):
    ssl = SSLUpstream(folders / "hubert-base")
    lengths = torch.arange(400, 3000)
    expected = ssl.model._get_feat_extract_output_lengths(lengths)
    assert torch.equal(ssl.frame_lengths(lengths), expected)
    assert ssl.frame_lengths(torch.tensor([0, 1, 399])).tolist() == [0, 0, 0]


def test_normalisation_is_read_or_given(folders, tmp_path, caplog):
    assert SSLUpstream(folders / "hubert-large").normalize
    assert not SSLUpstream(folders / "hubert-base").normalize
    assert SSLUpstream(folders / "hubert-base", normalize=True).normalize
    assert not SSLUpstream(folders / "hubert-large", normalize=False).normalize
    FAMILIES["hubert-large"].save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert not SSLUpstream(tmp_path, random_init=True).normalize
    assert "no preprocessor_config.json" in caplog.text


def test_trainable_patterns(folders, caplog):
    with caplog.at_level(logging.INFO):
        ssl = SSLUpstream(folders / "hubert-base", trainable=["encoder.layers.2.*"])
    names = {name for name, p in ssl.model.named_parameters() if p.requires_grad}
    assert names == {n for n in ssl.model.state_dict() if n.startswith("encoder.layers.2.")}
    assert f"{len(names)} of {len(list(ssl.parameters()))} parameter tensors" in caplog.text
    ssl.train()(*batch([4000]))[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in ssl.parameters())
    with pytest.raises(InputError, match=r"'encoder\.layer\.1\.\*' matches no.*encoder\.layers"):
        SSLUpstream(folders / "hubert-base", trainable=["encoder.layer.1.*"])


def test_a_frozen_model_stays_in_eval_mode(folders):
    ssl = SSLUpstream(folders / "hubert-base")
    assert not any(p.requires_grad for p in ssl.parameters())
    assert not ssl.train().model.training
    assert SSLUpstream(folders / "hubert-base", trainable=["*"]).train().model.training


def test_random_init_draws_from_torchs_generator(folders, tmp_path):
    FAMILIES["wavlm-base"].save_pretrained(tmp_path)
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(SSLUpstream(tmp_path, random_init=True).model.encoder.layers[0].state_dict())
    key = "feed_forward.intermediate_dense.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_save_pretrained_round_trip(folders, tmp_path):
    ssl = SSLUpstream(folders / "hubert-large")
    ssl.save_pretrained(tmp_path / "a folder")
    assert json.loads((tmp_path / "a folder/config.json").read_text())["layerdrop"] == 0.1
    again = SSLUpstream(tmp_path / "a folder")
    waves, lengths = batch([4000, 5000])
    torch.testing.assert_close(again(waves, lengths), ssl(waves, lengths), rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["a folder"]
    with pytest.raises(InputError, match="exists already"):
        ssl.save_pretrained(tmp_path / "a folder")


def test_check_layer(folders):
    config = load_config(folders / "hubert-base")
    assert [load.check_layer(config, i) for i in (None, -1, 0, 2, 3)] == [3, 3, 0, 2, 3]
    assert SSLUpstream(folders / "hubert-base").check_layer(-1) == 3
    for layer in (4, -2):
        with pytest.raises(InputError, match=rf"layer {layer} is out of range.*0 to 3"):
            load.check_layer(config, layer)


def test_lengths_are_checked(folders):
    ssl = SSLUpstream(folders / "hubert-base")
    with pytest.raises(InputError, match=r"utterance 1 .*399 samples.* 400 "):
        ssl(torch.randn(2, 1000), torch.tensor([1000, 399]))
    with pytest.raises(InputError, match=r"lengths\[0\] is 1001.*1\.\.1000"):
        ssl(torch.randn(2, 1000), torch.tensor([1001, 400]))


def test_models_that_cannot_be_loaded(folders, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="missing: no such folder"):
        SSLUpstream(tmp_path / "missing")
    with pytest.raises(InputError, match="neither a local folder"):
        SSLUpstream(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'bert' is not supported"):
        load_config(tmp_path)
    FAMILIES["hubert-base"].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="weights cannot be loaded"):
        SSLUpstream(tmp_path)
    weights = folders / "hubert-base/model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    HubertConfig(**{**TINY, "num_hidden_layers": 4}, **GROUP).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"weights lack \d+ .*encoder\.layers\.3"):
        SSLUpstream(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no-such-model-here: neither") as caught:
        load_config("no-such-model-here")
    assert "\n" not in str(caught.value)


def test_frozen_is_invisible_to_its_holder(folders):
    frozen = Frozen(SSLUpstream(folders / "hubert-base", trainable=["*"]).train())
    assert not frozen.module.training
    assert not any(p.requires_grad for p in frozen.module.parameters())
    holder = torch.nn.Linear(2, 2)
    holder.ssl = frozen
    assert set(holder.state_dict()) == {"weight", "bias"}
    holder.train().double()
    assert not frozen.module.training
    assert next(frozen.module.parameters()).dtype == torch.float32
    waves, lengths = batch([4000, 5000])
    expected = frozen(waves, lengths)
    torch.testing.assert_close(copy.deepcopy(frozen)(waves, lengths), expected, rtol=0, atol=0)


def test_frozen_pickles_with_a_module_that_does():
    frozen = Frozen(torch.nn.Linear(3, 2))
    x = torch.randn(4, 3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x), frozen(x), rtol=0, atol=0)


def test_frozen_follows_its_inputs_device():
    frozen = Frozen(torch.nn.Linear(3, 2))
    assert frozen(torch.empty(1, 3, device="meta")).device.type == "meta"
    assert frozen.module.weight.device.type == "meta"
    assert Frozen(torch.nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
