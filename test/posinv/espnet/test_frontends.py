import pytest
import torch
from transformers import HubertModel

from posinv.errors import InputError
from posinv.espnet.frontends import EnhSSLFrontend, SSLFrontend
from posinv.espnet.tasks.enh import EnhancementTask

LENGTHS = torch.tensor([4000, 400, 2345])


@pytest.fixture
def waves():
    torch.manual_seed(0)
    return torch.randn(3, 4000)


def expected_features(tiny_ssl, wave, weights):
    """The expected features: the weighted sum of transformers' layers for one utterance."""
    model = HubertModel.from_pretrained(tiny_ssl).eval()
    with torch.no_grad():
        layers = torch.stack(model(wave[None], output_hidden_states=True).hidden_states)[:, 0]
    return (torch.softmax(weights, 0)[:, None, None] * layers).sum(dim=0)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_enh_ssl_follows_the_device(tiny_ssl, enh_dir, waves):
    files = str(enh_dir / "config.yaml"), str(enh_dir / "valid.loss.best.pth")
    frontend = EnhSSLFrontend(tiny_ssl, *files)
    on_cpu, _ = frontend(waves, LENGTHS)
    on_gpu, _ = frontend.cuda()(waves.cuda(), LENGTHS.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)


def test_bad_input(tiny_ssl, enh_dir):
    with pytest.raises(InputError, match="cache_gb must be at least 0"):
        SSLFrontend(tiny_ssl, cache_gb=-1)
    with pytest.raises(InputError, match=r"enhancement model nowhere.yaml: No such file"):
        EnhSSLFrontend(tiny_ssl, "nowhere.yaml", str(enh_dir / "valid.loss.best.pth"))
    with pytest.raises(InputError, match="399 samples, less than the 400"):
        SSLFrontend(tiny_ssl)(torch.zeros(1, 399), torch.tensor([399]))
