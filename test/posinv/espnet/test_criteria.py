import numpy as np
import pytest
import torch
from espnet2.enh.loss.wrappers.fixed_order import FixedOrderSolver
from transformers import HubertModel

from posinv.augment.pad import ZeroPad
from posinv.augment.speed import SpeedPerturb
from posinv.errors import InputError
from posinv.espnet.criteria import (
    CRITERIA,
    SSLMSECriterion,
    SSLMSEPadCriterion,
    SSLSoftDTWCriterion,
    SSLXCorrCriterion,
)
from posinv.softdtw import soft_dtw

LENGTHS = [6400, 400, 3333, 5000]
KEYS = ["a", "b", "c", "d"]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    clean = torch.randn(4, 6400)
    enhanced = clean + 0.3 * torch.randn(4, 6400)
    return clean, enhanced, torch.tensor(LENGTHS)


def layer_of(tiny_ssl, wave, layer=3):
    """The expected features (F, D): those of transformers for one utterance, in float64."""
    model = HubertModel.from_pretrained(tiny_ssl).double().eval()
    with torch.no_grad():
        return model(wave[None].double(), output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize("name", CRITERIA)
def test_batch_is_utterances_one_by_one(name, tiny_ssl, batch):
    clean, enhanced, lengths = batch
    criterion = CRITERIA[name](tiny_ssl)
    enhanced.requires_grad_()
    criterion.utt_ids, criterion.lengths = KEYS, lengths
    together = criterion(clean, enhanced)
    together.sum().backward()
    gradient = enhanced.grad.clone()
    assert together.shape == (4,)
    for b, (key, length) in enumerate(zip(KEYS, LENGTHS, strict=True)):
        alone = enhanced.detach()[b : b + 1, :length].clone().requires_grad_()
        criterion.utt_ids, criterion.lengths = [key], torch.tensor([length])
        loss = criterion(clean[b : b + 1, :length], alone)
        torch.testing.assert_close(loss[0], together[b], rtol=1e-4, atol=1e-5)
        loss.sum().backward()
        scale = alone.grad.norm()
        assert (gradient[b, :length] - alone.grad[0]).norm() <= 1e-3 * scale + 1e-6
        assert gradient[b, length:].abs().sum() == 0
        if length > 400:
            assert scale > 0


def test_mse_is_its_definition(tiny_ssl, batch):
    clean, enhanced, lengths = batch
    criterion = SSLMSECriterion(tiny_ssl, layer=2)
    criterion.lengths = lengths
    loss = criterion(clean, enhanced)
    for b, length in enumerate(LENGTHS):
        x, y = (layer_of(tiny_ssl, wave[b, :length], 2) for wave in (clean, enhanced))
        expected = (x - y).square().sum(dim=1).mean()
        assert loss[b].item() == pytest.approx(expected.item(), rel=1e-4)


def test_mse_pad_is_its_definition(tiny_ssl, batch):
    clean, enhanced, lengths = batch
    criterion = SSLMSEPadCriterion(tiny_ssl, pad=(0.2, 0.6))
    criterion.utt_ids, criterion.lengths = KEYS, lengths
    loss = criterion(clean, enhanced)
    padded, padded_lengths, hops = ZeroPad(0.2, 0.6, 320)(clean, lengths, KEYS)
    assert hops.max() > 2
    for b, length in enumerate(LENGTHS):
        y = layer_of(tiny_ssl, enhanced[b, :length])
        x = layer_of(tiny_ssl, padded[b, : padded_lengths[b]])[hops[b] : hops[b] + len(y)]
        assert loss[b].item() == pytest.approx((x - y).square().sum(dim=1).mean().item(), rel=1e-4)


def test_mse_pad_without_padding_is_mse(tiny_ssl, batch):
    clean, enhanced, lengths = batch
    pad, mse = SSLMSEPadCriterion(tiny_ssl, pad=(0, 0)), SSLMSECriterion(tiny_ssl)
    pad.lengths = mse.lengths = lengths
    torch.testing.assert_close(pad(clean, enhanced), mse(clean, enhanced))


@pytest.mark.parametrize("normalize_length", [False, True])
@pytest.mark.parametrize("divergence", [False, True])
def test_softdtw_is_its_definition(tiny_ssl, batch, divergence, normalize_length):
    clean, enhanced, lengths = batch
    torch.manual_seed(4)
    criterion = SSLSoftDTWCriterion(
        tiny_ssl, factors=[0.8, 1.2], divergence=divergence, normalize_length=normalize_length
    )
    criterion.utt_ids, criterion.lengths = KEYS, lengths
    # The utterance of one frame is too short at speed 1.2.
    keep = [0, 2, 3]
    clean, enhanced = clean[keep], enhanced[keep]
    criterion.utt_ids, criterion.lengths = [KEYS[b] for b in keep], lengths[keep]
    loss = criterion(clean, enhanced)
    sped, sped_lengths = SpeedPerturb([0.8, 1.2])(clean, lengths[keep], criterion.utt_ids)
    assert (
        len(
            {
                (n / m) > 1
                for n, m in zip(sped_lengths.tolist(), lengths[keep].tolist(), strict=True)
            }
        )
        == 2
    )

    def unit(x):
        return (x / x.norm(dim=1, keepdim=True)).numpy()

    def align(x, y):
        cost = ((x[:, None] - y[None]) ** 2).sum(-1)
        return float(soft_dtw(torch.from_numpy(cost)[None], gamma=0.1, backend="reference"))

    for b in range(3):
        x = unit(layer_of(tiny_ssl, enhanced[b, : criterion.lengths[b]]))
        y = unit(layer_of(tiny_ssl, sped[b, : sped_lengths[b]]))
        expected = align(x, y)
        if divergence:
            expected -= (align(x, x) + align(y, y)) / 2
        if normalize_length:
            expected /= len(x) + len(y)
        assert loss[b].item() == pytest.approx(expected, rel=1e-3)


def test_softdtw_in_a_slanted_band_takes_any_speed_and_length(tiny_ssl, batch):
    clean, enhanced = (wave.repeat(1, 5) for wave in batch[:2])
    enhanced.requires_grad_()
    criterion = SSLSoftDTWCriterion(tiny_ssl, factors=[0.8, 1.2], bandwidth=1)
    loss = criterion(clean, enhanced)
    loss.sum().backward()
    assert loss.isfinite().all() and enhanced.grad.isfinite().all() and enhanced.grad.any()


def test_a_fixed_band_that_speeds_can_leave_is_refused_before_training(tiny_ssl):
    with pytest.raises(InputError) as error:
        SSLSoftDTWCriterion(tiny_ssl, factors=[1.1, 0.9, 1.0], bandwidth=20, band="fixed")
    # At 0.9, 180 frames become 200.
    assert str(error.value) == (
        "ssl_softdtw: bandwidth 20 of a fixed band is too narrow for utterances over 3.6 s (180 "
        "frames) at speed 0.9 of factors: set band: slanted, which fits all lengths, or factors: "
        "[1.0]"
    )
    SSLSoftDTWCriterion(tiny_ssl, factors=[1.0], bandwidth=20, band="fixed")
    SSLSoftDTWCriterion(tiny_ssl, factors=[1.1, 0.9, 1.0], band="fixed")


def test_xcorr_is_its_definition(tiny_ssl, batch):
    clean, enhanced, lengths = batch
    criterion = SSLXCorrCriterion(tiny_ssl, max_lag=3, temperature=0.05)
    criterion.lengths = lengths
    loss = criterion(clean, enhanced)
    for b, length in enumerate(LENGTHS):
        x, y = (layer_of(tiny_ssl, wave[b, :length]) for wave in (clean, enhanced))
        x, y = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
        scores = [
            np.mean([float(y[i] @ x[i + lag]) for i in range(len(y)) if 0 <= i + lag < len(x)])
            for lag in range(-3, 4)
            if abs(lag) < len(x)
        ]
        expected = -0.05 * np.log(np.mean(np.exp(np.array(scores) / 0.05)))
        assert loss[b].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["ssl_mse", "ssl_softdtw"])
def test_clean_speech_costs_nothing(name, tiny_ssl, batch):
    clean, _, lengths = batch
    conf = {"factors": [1.0]} if name == "ssl_softdtw" else {}
    criterion = CRITERIA[name](tiny_ssl, **conf)
    criterion.lengths = lengths
    assert criterion(clean, clean.clone()).abs().max() < 1e-4


@pytest.mark.parametrize("name", CRITERIA)
def test_silence_has_finite_loss_and_gradient(name, tiny_ssl):
    enhanced = torch.zeros(2, 4000, requires_grad=True)
    criterion = CRITERIA[name](tiny_ssl)
    loss = criterion(torch.zeros(2, 4000), enhanced)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert enhanced.grad.isfinite().all()


def test_ssl_model_is_frozen_and_apart(tiny_ssl, batch):
    clean, enhanced, lengths = batch
    criterion = SSLMSECriterion(tiny_ssl)
    criterion.lengths = lengths
    criterion(clean, enhanced)
    criterion.train()
    model = criterion.upstream.module
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CRITERIA)
def test_follows_the_device(name, tiny_ssl, batch):
    clean, enhanced, lengths = batch
    criterion = CRITERIA[name](tiny_ssl)
    criterion.utt_ids, criterion.lengths = KEYS, lengths
    on_cpu = criterion(clean, enhanced)
    criterion.lengths = lengths.cuda()
    on_gpu = criterion(clean.cuda(), enhanced.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)


def test_works_in_espnets_wrapper(tiny_ssl, batch):
    clean, enhanced, _ = batch
    criterion = SSLMSECriterion(tiny_ssl)
    loss, stats, _ = FixedOrderSolver(criterion, weight=1.0)([clean], [enhanced])
    torch.testing.assert_close(loss, criterion(clean, enhanced).mean())
    assert stats["ssl_mse"] == loss


def test_bad_input(tiny_ssl):
    with pytest.raises(
        InputError, match=r"layer 4 is out of range: this SSL model has hidden states 0 to 3"
    ):
        SSLMSECriterion(tiny_ssl, layer=4)
    with pytest.raises(InputError, match="no such folder"):
        SSLMSECriterion("/nonexistent/model")
    with pytest.raises(InputError, match="ssl_mse_pad: pad must be two numbers"):
        SSLMSEPadCriterion(tiny_ssl, pad=(0.1,))
    with pytest.raises(InputError, match="SSLXCorr: max_lag must be at least 0"):
        SSLXCorrCriterion(tiny_ssl, max_lag=-1)
    with pytest.raises(InputError, match=r"must both be \(B, T\), got \(2, 500\) and \(2, 501\)"):
        SSLMSECriterion(tiny_ssl)(torch.zeros(2, 500), torch.zeros(2, 501))
    with pytest.raises(InputError, match="399 samples, less than the 400 of one SSL frame"):
        SSLMSECriterion(tiny_ssl)(torch.zeros(1, 399), torch.zeros(1, 399))
