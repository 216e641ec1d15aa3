import math
import shutil

import pytest
import torch
import torchaudio
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from posinv.errors import InputError
from posinv.espnet.frontends import EnhSSLFrontend, LayersFrontend, SSLFrontend
from posinv.espnet.tasks.enh import EnhancementTask

LENGTHS = torch.tensor([4000, 400, 2345])


@pytest.fixture
def waves():
    torch.manual_seed(0)
    return torch.randn(3, 4000)


def expected_layers(tiny_ssl, wave):
    """transformers' layers ``(L+1, F, D)`` for one utterance."""
    model = HubertModel.from_pretrained(tiny_ssl).eval().requires_grad_(False)
    return torch.stack(model(wave[None], output_hidden_states=True).hidden_states)[:, 0]


def expected_features(tiny_ssl, wave, weights):
    """The expected features: the weighted sum of transformers' layers for one utterance."""
    layers = expected_layers(tiny_ssl, wave)
    return (torch.softmax(weights.detach(), 0)[:, None, None] * layers).sum(dim=0)


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_weighted_sum_of_each_utterance(tiny_ssl, waves, cache_gb):
    frontend = SSLFrontend(tiny_ssl, cache_gb=cache_gb)
    with torch.no_grad():
        frontend.weights.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    for _ in range(2):  # the second time from the cache
        features, lengths = frontend(waves, LENGTHS)
        assert features.shape == (3, 12, frontend.output_size()) == (3, 12, 32)
        for b, length in enumerate(LENGTHS.tolist()):
            expected = expected_features(tiny_ssl, waves[b, :length], frontend.weights)
            assert lengths[b] == len(expected)
            torch.testing.assert_close(features[b, : lengths[b]], expected, rtol=1e-4, atol=1e-5)
            assert features[b, lengths[b] :].abs().sum() == 0


def test_only_the_weights_train_and_are_saved(tiny_ssl, waves):
    frontend = SSLFrontend(tiny_ssl).train()
    features, _ = frontend(waves, LENGTHS)
    features.square().sum().backward()
    assert [name for name, _ in frontend.named_parameters()] == ["weights"]
    assert frontend.weights.grad.abs().sum() > 0
    assert list(frontend.state_dict()) == ["weights"]
    assert not frontend.upstream.module.training


def assert_gradient(frontend, waves, lengths, expected):
    """The waveforms' gradient is that of ``expected``, a function of one utterance ``(T,)``."""
    waves = waves.clone().requires_grad_()
    features, frames = frontend(waves, lengths)
    direction = torch.randn_like(features)
    (features * direction).sum().backward()
    for b, (length, count) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        wave = waves[b, :length].detach().requires_grad_()
        own = expected(wave)
        torch.testing.assert_close(features[b, :count], own, rtol=1e-4, atol=1e-5)
        (own * direction[b, :count]).sum().backward()
        error = (waves.grad[b, :length] - wave.grad).norm() / wave.grad.norm()
        assert error < 1e-4
        assert not waves.grad[b, length:].any()


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_gradient_reaches_the_waveform(tiny_ssl, waves, cache_gb):
    frontend = SSLFrontend(tiny_ssl, cache_gb=cache_gb).train()
    with torch.no_grad():
        frontend.weights.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    frontend(waves[:2], LENGTHS[:2])  # into the cache, if there is one
    cached = dict(frontend.cache.layers) if cache_gb else {}
    assert_gradient(
        *(frontend, waves, LENGTHS),
        lambda wave: expected_features(tiny_ssl, wave, frontend.weights),
    )
    assert cached == (frontend.cache.layers if cache_gb else {})
    assert not any(layers.requires_grad for layers in cached.values())
    assert all(p.grad is None for p in frontend.upstream.module.parameters())
    assert not any(module.training for module in frontend.upstream.module.modules())


def saved_values(frontend, waves):
    """How many values autograd keeps for the backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x
    ):
        frontend(waves, LENGTHS)
    return sum(x.numel() for x in kept.values())


@pytest.mark.parametrize("enhanced", [False, True])
def test_no_graph_where_nothing_in_front_learns(tiny_ssl, enh_dir, waves, enhanced):
    files = str(enh_dir / "config.yaml"), str(enh_dir / "valid.loss.best.pth")
    frontend = EnhSSLFrontend(tiny_ssl, *files) if enhanced else SSLFrontend(tiny_ssl)
    layers, _ = frontend.encode(waves, LENGTHS)
    assert layers.grad_fn is None and not layers.requires_grad
    alone = saved_values(frontend, waves)
    assert alone <= layers.numel() + 2 * len(layers)  # the layers, for their weights' gradient
    assert saved_values(frontend, waves.clone().requires_grad_()) > 10 * alone


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_one_layer(tiny_ssl, waves, layer, cache_gb):
    frontend = SSLFrontend(tiny_ssl, cache_gb=cache_gb, layer=layer)
    assert not list(frontend.parameters()) and not frontend.state_dict()
    for _ in range(2):
        features, lengths = frontend(waves, LENGTHS)
        for b, length in enumerate(LENGTHS.tolist()):
            expected = expected_layers(tiny_ssl, waves[b, :length])[layer]
            torch.testing.assert_close(features[b, : lengths[b]], expected, rtol=1e-4, atol=1e-5)
    assert_gradient(
        *(frontend, waves, LENGTHS), lambda wave: expected_layers(tiny_ssl, wave)[layer]
    )


@pytest.mark.parametrize(("fs", "rate"), [("8k", 8000), (44100, 44100), (16000, 16000)])
def test_other_sampling_rates_are_resampled(tiny_ssl, waves, fs, rate):
    def expected(wave):
        wave = torchaudio.functional.resample(wave.double(), rate, 16000).float()
        return expected_features(tiny_ssl, wave, frontend.weights)

    frontend = SSLFrontend(tiny_ssl, fs=fs)
    lengths = torch.tensor([4000, 1111, 2345])
    with torch.inference_mode():
        features, frames = frontend(waves, lengths)
    samples = [math.ceil(length * 16000 / rate) for length in lengths.tolist()]
    assert frames.tolist() == [(n - 400) // 320 + 1 for n in samples]
    for b, length in enumerate(lengths.tolist()):
        own = features[b, : frames[b]]
        torch.testing.assert_close(own, expected(waves[b, :length]), rtol=1e-4, atol=1e-5)
    assert_gradient(frontend, waves, lengths, expected)


def test_cache_encodes_an_utterance_once_and_keeps_to_its_room(tiny_ssl, waves, monkeypatch):
    calls = []
    encode = SSLFrontend.encode
    monkeypatch.setattr(
        SSLFrontend, "encode", lambda self, *args: calls.append(1) or encode(self, *args)
    )
    frontend = SSLFrontend(tiny_ssl, cache_gb=1.0)
    first, _ = frontend(waves, LENGTHS)
    second, _ = frontend(waves, LENGTHS)
    assert len(calls) == 3
    assert torch.equal(first, second)
    small = SSLFrontend(tiny_ssl, cache_gb=(4 * 12 * 32 * 4) / 2**30)  # the longest, and no more
    small(waves, LENGTHS)
    small(waves, LENGTHS)
    assert len(calls) == 3 + 3 + 2


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_enh_ssl_is_ssl_of_enhanced_speech(tiny_ssl, enh_dir, waves, cache_gb):
    config, checkpoint = str(enh_dir / "config.yaml"), str(enh_dir / "valid.loss.best.pth")
    frontend = EnhSSLFrontend(tiny_ssl, config, checkpoint, cache_gb=cache_gb)
    model, _ = EnhancementTask.build_model_from_file(config, checkpoint, "cpu")
    model.eval()
    features, lengths = frontend(waves, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        with torch.no_grad():
            enhanced = model.forward_enhance(waves[b : b + 1, :length], LENGTHS[b : b + 1], {})[0]
        expected = expected_features(tiny_ssl, enhanced[0][0, :length], frontend.weights)
        torch.testing.assert_close(features[b, : lengths[b]], expected, rtol=1e-4, atol=1e-5)
    plain, _ = SSLFrontend(tiny_ssl)(waves, LENGTHS)
    assert (features - plain).abs().max() > 1e-3
    assert [name for name, _ in frontend.named_parameters()] == ["weights"]


@pytest.mark.parametrize("normalize_variance", [False, True])
@pytest.mark.parametrize("kind", ["demucs", "stft"])
def test_a_gradient_goes_through_enh_ssl(
    tiny_ssl, enh_dir, stft_dir, waves, kind, normalize_variance
):
    def expected(wave):
        scale = wave.std() if normalize_variance else 1.0
        lengths = torch.tensor([len(wave)])
        enhanced = model.forward_enhance(wave[None] / scale, lengths, {})[0][0]
        return expected_features(tiny_ssl, enhanced[0, : len(wave)] * scale, frontend.weights)

    files = {
        "demucs": (str(enh_dir / "config.yaml"), str(enh_dir / "valid.loss.best.pth")),
        "stft": (str(stft_dir / "config.yaml"), str(stft_dir / "model.pth")),
    }[kind]
    model, _ = EnhancementTask.build_model_from_file(*files, "cpu")
    model.eval().requires_grad_(False)
    frontend = EnhSSLFrontend(tiny_ssl, *files)
    frontend.separate.enh_model.normalize_variance = normalize_variance
    assert_gradient(frontend, waves, LENGTHS, expected)
    without, _ = frontend(waves, LENGTHS)
    torch.testing.assert_close(frontend(waves.requires_grad_(), LENGTHS)[0], without)
    frontend.separate.enh_model.always_forward_in_48k = True
    with pytest.raises(InputError, match=r"no gradient goes through .* always_forward_in_48k"):
        frontend(waves, LENGTHS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_enh_ssl_follows_the_device(tiny_ssl, enh_dir, waves):
    files = str(enh_dir / "config.yaml"), str(enh_dir / "valid.loss.best.pth")
    frontend = EnhSSLFrontend(tiny_ssl, *files)
    on_cpu, _ = frontend(waves, LENGTHS)
    on_gpu, _ = frontend.cuda()(waves.cuda(), LENGTHS.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)
    gradients = [
        torch.autograd.grad(frontend(leaf, LENGTHS.to(leaf.device))[0].square().sum(), leaf)[0]
        for leaf in (waves.cuda().requires_grad_(), waves.clone().requires_grad_())
    ]
    torch.testing.assert_close(gradients[0].cpu(), gradients[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("layer", [None, 1])
def test_layers_are_summed_as_in_ssl(tiny_ssl, waves, layer):
    whole = SSLFrontend(tiny_ssl, layer=layer)
    layers, frames = whole.layers(waves, LENGTHS)
    apart = LayersFrontend(32, 4 if layer is None else None)
    assert apart.output_size() == 32
    assert apart.state_dict().keys() == whole.state_dict().keys()
    if layer is None:
        with torch.no_grad():
            for frontend in (whole, apart):
                frontend.weights.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    found = apart(layers.permute(1, 2, 0, 3), frames)
    assert all(torch.equal(*pair) for pair in zip(found, whole(waves, LENGTHS), strict=True))
    assert torch.equal(frames, whole.frames(LENGTHS))
    assert SSLFrontend(tiny_ssl, fs=8000).frames(LENGTHS).tolist() == [24, 2, 14]


def test_digest_is_of_all_that_the_layers_depend_on(tiny_ssl, enh_dir, tmp_path):
    shutil.copytree(tiny_ssl, tmp_path / "ssl")
    model = HubertModel.from_pretrained(tiny_ssl)
    model.encoder.layers[0].attention.k_proj.bias.data[0] += 1
    model.save_pretrained(tmp_path / "other")
    shutil.copytree(tiny_ssl, tmp_path / "normalised")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "normalised")
    config, checkpoint = enh_dir / "config.yaml", enh_dir / "valid.loss.best.pth"
    state = torch.load(checkpoint, weights_only=True)
    state["separator.encoder.0.0.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    (tmp_path / "other.yaml").write_text(f"{config.read_text()}max_epoch: 7\n")
    first = SSLFrontend(tiny_ssl).digest()
    assert SSLFrontend(tmp_path / "ssl", cache_gb=1).digest() == first
    others = [
        SSLFrontend(tiny_ssl, layer=1),
        SSLFrontend(tiny_ssl, layer=2),
        SSLFrontend(tmp_path / "other"),
        SSLFrontend(tmp_path / "normalised"),
        EnhSSLFrontend(tiny_ssl, str(config), str(checkpoint)),
        EnhSSLFrontend(tiny_ssl, str(config), str(tmp_path / "other.pth")),
        EnhSSLFrontend(tiny_ssl, str(tmp_path / "other.yaml"), str(checkpoint)),
    ]
    assert len({first, *(other.digest() for other in others)}) == 1 + len(others)


def test_loading_a_frozen_model_leaves_the_draws_that_follow_as_they_are(tiny_ssl, enh_dir):
    """A head's initial weights are drawn after it in asr_train, but not in heads_train."""
    files = str(enh_dir / "config.yaml"), str(enh_dir / "valid.loss.best.pth")
    for load in (lambda: SSLFrontend(tiny_ssl), lambda: EnhSSLFrontend(tiny_ssl, *files)):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        load()
        assert torch.equal(torch.rand(3), expected)


def test_bad_input(tiny_ssl, enh_dir):
    with pytest.raises(InputError, match="cache_gb must be at least 0"):
        SSLFrontend(tiny_ssl, cache_gb=-1)
    with pytest.raises(InputError, match="layer 4 is out of range"):
        SSLFrontend(tiny_ssl, layer=4)
    for fs in ("fast", 0, 16, 15999):
        with pytest.raises(InputError, match=f"fs: {fs}: no sampling rate"):
            SSLFrontend(tiny_ssl, fs=fs)
    with pytest.raises(InputError, match=r"enhancement model nowhere.yaml: No such file"):
        EnhSSLFrontend(tiny_ssl, "nowhere.yaml", str(enh_dir / "valid.loss.best.pth"))
    with pytest.raises(InputError, match="399 samples, less than the 400"):
        SSLFrontend(tiny_ssl)(torch.zeros(1, 399), torch.tensor([399]))
