"""Losses and gradients are finite for whatever audio and features may be, or refused by name."""

import math
import re

import pytest
import torch
from tiny_ssl import TINY_SSL
from torch import nn
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from posinv.errors import InputError
from posinv.losses import functional
from posinv.models.demucs import Demucs
from posinv.models.masked_prediction import MaskedPredictionModel
from posinv.models.nonfinite import first_nonfinite
from posinv.models.ssft import SSFTModel
from posinv.softdtw import SoftDTWLoss
from posinv.ssl.upstream import SSLUpstream

GAMMAS = [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3]


def features(kind: str) -> torch.Tensor:
    """Features (2, 12, 8) of a kind."""
    x = torch.randn(2, 12, 8)
    return {
        "random": lambda: x,
        "zeros": lambda: torch.zeros_like(x),
        "equal frames": lambda: x[:, :1].expand_as(x).clone(),
        "one frame": lambda: x * (torch.arange(12) == 5)[:, None],
        "tiny": lambda: 1e-20 * x,
        "huge": lambda: 1e6 * x,
        "far away": lambda: 1e4 + x,
        "steps": lambda: x.sign(),
    }[kind]()


KINDS = ("random", "zeros", "equal frames", "one frame", "tiny", "huge", "far away", "steps")
LOSSES = {
    "ssl_mse": functional.ssl_mse,
    "ssl_mse_sum": lambda x, y, n: functional.ssl_mse(x, y, n, "sum"),
    "ssl_mse_pad": lambda x, y, n: functional.ssl_mse_pad(x, y, [0, 0], n),
    "ssl_xcorr": functional.ssl_xcorr,
    "idm": lambda x, y, n: functional.contrastive_idm(x, n) + functional.contrastive_idm(y, n),
}
for gamma in GAMMAS:
    for cost, normalize in (("sqeuclidean", True), ("sqeuclidean", False), ("cosine", False)):
        loss = SoftDTWLoss(gamma, cost=cost, normalize_features=normalize)
        LOSSES[f"soft_dtw {gamma:g} {cost} {normalize}"] = lambda x, y, n, loss=loss: loss(
            x, y, n, n
        )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_any_features(name):
    torch.manual_seed(0)
    for first in KINDS:
        for second in (first, "random"):
            # float32, and what comes out of a bfloat16 module
            for dtype in (torch.float32, torch.bfloat16):
                for autocast in (False, True):
                    x = features(first).to(dtype).requires_grad_()
                    y = x.detach().clone() if second == first else features(second).to(dtype)
                    y.requires_grad_()
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        value = LOSSES[name](x, y, [12, 7])
                    value.float().sum().backward()
                    what = f"{first}, {second}, {dtype}, autocast {autocast}"
                    assert value.shape == (2,) and value.isfinite().all(), what
                    assert x.grad.isfinite().all() and y.grad.isfinite().all(), what


def waves(kind: str) -> torch.Tensor:
    """Waveforms (2, 4000) of a kind."""
    x = 0.1 * torch.randn(2, 4000)
    return {
        "speech": lambda: x,
        "silence": lambda: torch.zeros_like(x),
        "clipped": lambda: (100 * x).clamp(-1, 1),
        "constant": lambda: torch.full_like(x, 0.3),
        "one sample": lambda: (torch.arange(4000) == 2000).float().expand(2, 4000).clone(),
        "faint": lambda: 1e-8 * x,
        "mixed": lambda: torch.stack([x[0], torch.zeros(4000)]),
    }[kind]()


WAVES = ("speech", "silence", "clipped", "constant", "one sample", "faint", "mixed")


@pytest.fixture(scope="module", params=[False, True], ids=["group norm", "layer norm, normalised"])
def ssl(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssl")
    torch.manual_seed(0)
    kind = "layer" if request.param else "group"
    HubertModel(HubertConfig(**TINY_SSL, feat_extract_norm=kind)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=request.param).save_pretrained(folder)
    return str(folder)


def check_gradients(model: nn.Module, what: str) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"{what}: {name}"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", WAVES)
def test_a_gradient_through_an_ssl_model_to_the_waveform(ssl, kind, autocast):
    torch.manual_seed(0)
    upstream = SSLUpstream(ssl)
    x = waves(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, _ = upstream(x, [4000, 3000])
        reference = upstream(waves("speech"), [4000, 3000])[0].detach()
        loss = functional.ssl_mse(hidden[-1], reference[-1]).sum()
    loss.backward()
    assert hidden.isfinite().all() and loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", WAVES)
def test_fine_tuning_an_ssl_model(ssl, kind, autocast):
    for options in (
        {"gamma": 1e-3, "alpha": 0.4, "views": {"speed": [0.9, 1.1]}},
        {"gamma": 1e3, "alpha": 0.4},
        {"loss": "mse", "alpha": 0.15},
    ):
        torch.manual_seed(0)
        model = SSFTModel(ssl, trainable_layers=1, projection_size=8, **options).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, stats, _ = model(waves(kind), [4000, 3000], ["a", "b"])
        loss.backward()
        assert all(value.isfinite() for value in (loss, *stats.values())), (options, stats)
        check_gradients(model, f"{options}")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", WAVES)
def test_pretraining_and_enhancement(kind, autocast):
    torch.manual_seed(0)
    model = MaskedPredictionModel(TINY_SSL, 5).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        units = torch.randint(5, (2, 12))
        loss, *_ = model(waves(kind), [4000, 4000], units, torch.tensor([12, 12]), ["a", "b"])
    loss.backward()
    assert loss.isfinite()
    check_gradients(model, "pretraining")

    demucs = Demucs(hidden=4, depth=2, resample=2).train()
    x = waves(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        enhanced = demucs(x, torch.tensor([4000, 3000]))
    enhanced.float().square().sum().backward()
    assert enhanced.isfinite().all()
    check_gradients(demucs, "demucs")
    assert x.grad.isfinite().all()


def test_gammas_that_are_no_numbers_are_refused():
    for gamma in (math.nan, math.inf, -1e-3, -1.0):
        with pytest.raises(InputError, match="gamma"):
            SoftDTWLoss(gamma)


# ------------------------------------------------------------------- the module is named


class Net(nn.Module):
    """Two layers; ``bad`` says where values stop being finite."""

    def __init__(self, bad=None):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.bad = bad
        self.middle, self.pair = Middle(bad), Pair(bad)
        self.criteria = [Middle("log" if bad == "criterion" else None)]

    def forward(self, x, utt_id):
        y = self.second(self.middle(self.first(x)))
        y, _ = self.pair(self.criteria[0](y))
        loss = (y.sum() * 0).sqrt() if self.bad == "gradient" else y.square().sum()
        return (loss / 0 if self.bad == "loss" else loss), {}, loss.new_full((), len(x))


class Middle(nn.Module):
    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, x):
        return (x - x).log() if self.bad == "log" else x


class Pair(nn.Module):
    """Its output is a tuple, as an LSTM's."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, x):
        return x, [{"log": (x - x).log() if self.bad == "pair" else x}]


@pytest.mark.parametrize(
    "bad, said",
    [
        ("log", r"first module with such a value is middle \(Middle\)"),
        ("criterion", r"first module with such a value is criteria\.0 \(Middle\)"),
        ("pair", r"first module with such a value is pair \(Pair\)"),
        ("loss", "all modules' outputs are finite: the loss computed from them is not"),
        ("gradient", r"the first gradient that is not is that of (first|second)\."),
        (None, "run once more, loss and gradients are finite"),
    ],
)
def test_the_first_module_is_named(bad, said):
    torch.manual_seed(0)
    model = Net(bad)
    state = torch.get_rng_state()
    where = first_nonfinite(
        model, {"x": torch.ones(2, 3), "utt_id": ["a", "b"]}, lambda out: out[0]
    )
    assert re.search(said, where), where
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_parameter_that_is_not_finite_is_named():
    model = Net()
    model.second.weight.data[0, 0] = math.nan
    where = first_nonfinite(model, {"x": torch.ones(2, 3), "utt_id": ["a"]}, lambda out: out[0])
    assert where == "the parameter second.weight is not finite itself"
