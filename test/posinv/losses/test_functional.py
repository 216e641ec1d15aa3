import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.augment.pad import ZeroPad
from posinv.errors import InputError
from posinv.losses import SSLMSE, ContrastiveIDM, SSLMSEPad, SSLSoftDTW, SSLXCorr
from posinv.losses.functional import (
    contrastive_idm,
    effective_rank,
    frame_distance,
    ssl_mse,
    ssl_mse_pad,
    ssl_softdtw,
    ssl_xcorr,
)
from posinv.softdtw import SoftDTWLoss, soft_dtw


def test_orthogonal_frames():
    x = 3 * torch.eye(5)[None]
    lengths = torch.tensor([5])
    assert frame_distance(x, lengths).item() == pytest.approx(math.sqrt(2), rel=1e-6)
    assert effective_rank(x, lengths).item() == pytest.approx(5, rel=1e-6)


def test_collapsed_frames():
    x = torch.randn(1, 1, 8).expand(1, 6, 8) * torch.rand(1, 6, 1)
    lengths = torch.tensor([6])
    assert frame_distance(x, lengths).item() == pytest.approx(0, abs=1e-6)
    assert effective_rank(x, lengths).item() == pytest.approx(1, abs=1e-4)


def test_rank_of_two_directions_by_hand():
    # Three frames along one axis, one along another: singular values sqrt(3) and 1.
    x = torch.tensor([[[2.0, 0], [1, 0], [5, 0], [0, 1]]])
    share = [math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(3))]
    expected = math.exp(-sum(p * math.log(p) for p in share))
    assert effective_rank(x, torch.tensor([4])).item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), dim=st.integers(1, 6))
def test_against_loops_and_within_bounds(seed, n, dim):
    x = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(seed))
    unit = x[0].double() / x[0].double().norm(dim=1, keepdim=True)
    pairs = [(a - b).norm().item() for a, b in itertools.permutations(unit, 2)]
    found = frame_distance(x, torch.tensor([n])).item()
    assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    rank = effective_rank(x, torch.tensor([n])).item()
    assert 1 - 1e-5 <= rank <= min(n, dim) + 1e-5


@pytest.mark.parametrize("measure", [frame_distance, effective_rank])
def test_batch_gives_what_utterances_give_alone(measure):
    torch.manual_seed(0)
    x = torch.randn(3, 9, 4)
    lengths = torch.tensor([9, 1, 5])
    together = measure(x, lengths)
    alone = [measure(x[b : b + 1, :n], torch.tensor([n])).item() for b, n in enumerate([9, 1, 5])]
    torch.testing.assert_close(together, torch.tensor(alone))
    x[1, 1:] = math.nan
    x[2, 5:] = math.inf
    assert torch.equal(measure(x, lengths), together)


@pytest.mark.parametrize("measure", [frame_distance, effective_rank])
def test_single_frame_and_silence_are_finite(measure):
    assert measure(torch.zeros(2, 4, 3), torch.tensor([1, 4])).isfinite().all()


# ------------------------------------------------------------------------------------ the losses
LENGTHS = [9, 1, 5]


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, 9, 4, generator=rng) for _ in range(2))
    for b, n in enumerate(LENGTHS):
        x[b, n:] = math.nan
        y[b, n:] = math.inf
    return x, y


def padded_reference(x, hops):
    """Put ``hops`` other frames in front of each utterance, and fill up to three more frames."""
    out = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2]), 7.0)
    for b, hop in enumerate(hops):
        out[b, hop : hop + x.shape[1]] = x[b]
    return out


PAIRS = {
    "ssl_mse": ssl_mse,
    "ssl_mse_pad": lambda x, y, n: ssl_mse_pad(
        padded_reference(x, [2] * len(x)), y, [2] * len(x), n
    ),
    "ssl_softdtw": lambda x, y, n: ssl_softdtw(x, y, n, n),
    "ssl_xcorr": ssl_xcorr,
    "contrastive_idm": lambda x, y, n: contrastive_idm(x, n, margin=1.1, window=1),
}


@pytest.mark.parametrize("name", PAIRS)
def test_padding_is_not_read_and_a_batch_is_its_utterances(name, pair):
    x, y = (z.clone().requires_grad_() for z in pair)
    together = PAIRS[name](x, y, LENGTHS)
    together.sum().backward()
    assert together.isfinite().all()
    assert x.grad.isfinite().all()
    for b, n in enumerate(LENGTHS):
        assert not x.grad[b, n:].any()
        alone = PAIRS[name](pair[0][b : b + 1, :n], pair[1][b : b + 1, :n], [n])
        torch.testing.assert_close(alone[0], together[b].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_lengths_of_any_kind(name, pair, kind):
    torch.testing.assert_close(PAIRS[name](*pair, kind(LENGTHS)), PAIRS[name](*pair, LENGTHS))


@pytest.mark.parametrize("name", PAIRS)
def test_bad_lengths_and_shapes_are_one_line(name, pair):
    for bad, match in (([9.0, 1.0, 5.0], "must be integers"), ([9, 1], r"must be \(3,\)")):
        with pytest.raises(InputError, match=match):
            PAIRS[name](*pair, bad)
    for bad in ([10, 1, 5], [0, 1, 5]):
        with pytest.raises(InputError, match=r"must be in 1\.\.9"):
            PAIRS[name](*pair, bad)
    if name != "contrastive_idm":
        with pytest.raises(InputError, match=r"\(B, [FM]"):
            PAIRS[name](pair[0], pair[1][:2], None)


def test_mse_by_hand(pair):
    x, y = pair
    expected = [
        sum(((x[b, i] - y[b, i]) ** 2).sum() for i in range(n)) / n for b, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(ssl_mse(x, y, LENGTHS), torch.stack(expected))
    total = torch.stack(expected) * torch.tensor(LENGTHS)
    torch.testing.assert_close(ssl_mse(x, y, LENGTHS, "sum"), total)
    with pytest.raises(InputError, match="reduction must be mean or sum: 'max'"):
        SSLMSE("max")


def test_padded_mse_shifts_back(pair):
    x, y = pair
    hops = [3, 0, 1]
    found = ssl_mse_pad(padded_reference(x, hops), y, hops, LENGTHS)
    torch.testing.assert_close(found, ssl_mse(x, y, LENGTHS))
    with pytest.raises(InputError, match=r"hops\[0\] is 4: the padded reference has 12 frames"):
        ssl_mse_pad(padded_reference(x, hops), y, [4, 0, 1], LENGTHS)


def test_hops_are_those_of_zero_pad():
    """A "feature" that is the first sample of each hop: shifted back, nothing differs."""
    wave = torch.arange(1.0, 4801.0)[None]
    padded, lengths, hops = ZeroPad(0.3, 0.5, 320)(wave, torch.tensor([4800]), ["a"])
    assert hops.item() > 0
    frames, padded_frames = (z[:, ::320, None] for z in (wave, padded[:, : lengths.item()]))
    assert ssl_mse_pad(padded_frames, frames, hops).item() == 0


def test_xcorr_by_loops(pair):
    x, y = pair
    for b, n in enumerate(LENGTHS):
        u, v = (z[b, :n].double() / z[b, :n].double().norm(dim=1, keepdim=True) for z in (x, y))
        scores = [
            np.mean([float(v[i] @ u[i + lag]) for i in range(n) if 0 <= i + lag < n])
            for lag in range(-3, 4)
            if abs(lag) < n
        ]
        expected = -0.05 * np.log(np.mean(np.exp(np.array(scores) / 0.05)))
        found = ssl_xcorr(x, y, LENGTHS, max_lag=3, temperature=0.05)[b].item()
        assert found == pytest.approx(expected, rel=1e-5)


def test_softdtw_normalises_features_and_length(pair):
    x, y = (z[:1].double() for z in pair)
    unit = [z[0] / z[0].norm(dim=1, keepdim=True) for z in (x, y)]
    cost = ((unit[0][:, None] - unit[1][None]) ** 2).sum(2)[None]
    expected = soft_dtw(cost, gamma=0.2, backend="reference") / 18
    found = ssl_softdtw(x, y, gamma=0.2, divergence=False, normalize_length=True)
    torch.testing.assert_close(found, expected)


def naive_idm(x, n, margin, window):
    """The formula, term by term."""
    total = 0.0
    for i in range(n):
        for j in range(n):
            distance = math.dist(x[i].tolist(), x[j].tolist())
            weight = (i - j) ** 2 + 1
            if abs(i - j) > window:
                total += weight * max(0.0, margin - distance)
            else:
                total += distance / weight
    return total / n**2


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_idm_equals_the_formula(window, dtype, tolerance):
    torch.manual_seed(0)
    x = 0.4 * torch.randn(4, 12, 3, dtype=dtype)
    lengths = torch.tensor([12, 5, 1, 2])
    x[1, 5:] = torch.nan
    value = contrastive_idm(x, lengths, 1.1, window)
    expected = [naive_idm(u, n, 1.1, window) for u, n in zip(x, lengths.tolist(), strict=True)]
    assert value.dtype == dtype
    torch.testing.assert_close(
        value.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=1e-12
    )


@pytest.mark.parametrize("window", [0, 2])
def test_idm_gradcheck(window):
    torch.manual_seed(0)
    x = (0.4 * torch.randn(2, 6, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrastive_idm(x, [6, 4], 1.1, window), x)


@pytest.mark.parametrize("window", [0, 2])
def test_idm_of_identical_frames_has_a_finite_gradient(window):
    x = torch.ones(1, 5, 3, requires_grad=True)
    value = contrastive_idm(x, None, 1.1, window)
    assert value.item() == pytest.approx(naive_idm(x[0], 5, 1.1, window), rel=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_idm_of_half_precision_is_computed_in_float32(dtype, autocast):
    x = (0.1 * torch.randn(2, 9, 16)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = contrastive_idm(x)
    assert value.dtype == torch.float32
    assert torch.equal(value, contrastive_idm(x.float()))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


def test_idm_of_an_empty_batch():
    x = torch.zeros(0, 4, 3, requires_grad=True)
    contrastive_idm(x).sum().backward()
    assert x.grad.shape == (0, 4, 3)


def laser(x, y, gamma, alpha, margin, window):
    """LASER's formulas for one pair, x (N, D) and y (M, D) in float64, by differences."""

    def squared(a, b):
        return (a[:, None] - b[None]).square().sum(dim=2)

    def idm(z):
        i = torch.arange(len(z))
        lag = (i[:, None] - i).abs()
        weight = lag.double().square() + 1
        d = (squared(z, z) + (lag == 0)).sqrt() * (lag > 0)  # the root has no gradient at 0
        far = (lag > window) * weight * (margin - d).clamp(min=0)
        return (far + (lag <= window) * d / weight).sum() / len(z) ** 2

    def s(a, b):
        return soft_dtw(squared(a, b)[None], gamma=gamma, backend="torch")[0]

    return s(x, y) - 0.5 * (s(x, x) + s(y, y)) + alpha * (idm(x) + idm(y))


@pytest.mark.parametrize(
    ("n", "m", "gamma", "window"),
    [(5, 9, 0.1, 0), (40, 33, 1.0, 2), (33, 40, 0.1, 2), (120, 120, 1.0, 0), (300, 271, 0.1, 0)],
)
def test_laser_in_float32_is_its_formulas(n, m, gamma, window):
    torch.manual_seed(n)

    def features(frames):  # neighbouring frames are near copies; all directions occur
        steps = torch.randn(frames, 24, dtype=torch.float64).cumsum(0)
        z = F.normalize(steps + torch.randn(24, dtype=torch.float64), dim=1)
        return z.float().double().requires_grad_()

    x, y = features(n), features(m)
    expected = laser(x, y, gamma, 0.4, 1.1, window)
    expected_gradients = torch.autograd.grad(expected, (x, y))
    ours = [z.detach().float()[None].requires_grad_() for z in (x, y)]
    loss = SoftDTWLoss(gamma)(*ours) + 0.4 * sum(
        contrastive_idm(z, margin=1.1, window=window) for z in ours
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, wanted in zip(torch.autograd.grad(loss, ours), expected_gradients, strict=True):
        assert (found[0] - wanted).norm() <= 1e-5 * wanted.norm()


def test_modules_are_the_functions(pair):
    x, y = pair
    for module, expected in (
        (SSLMSE()(x, y, LENGTHS), ssl_mse(x, y, LENGTHS)),
        (SSLMSE("sum")(x, y, LENGTHS), ssl_mse(x, y, LENGTHS, "sum")),
        (SSLMSEPad()(x, y, [0, 0, 0], LENGTHS), ssl_mse(x, y, LENGTHS)),
        (SSLSoftDTW(gamma=1.0)(x, y, LENGTHS, LENGTHS), ssl_softdtw(x, y, LENGTHS, LENGTHS, 1.0)),
        (SSLXCorr(2, 0.3)(x, y, LENGTHS), ssl_xcorr(x, y, LENGTHS, 2, 0.3)),
        (ContrastiveIDM(0.7, 2)(x, LENGTHS), contrastive_idm(x, LENGTHS, 0.7, 2)),
    ):
        torch.testing.assert_close(module, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SSLXCorr(max_lag=-1),
            "SSLXCorr: max_lag must be at least 0 and temperature positive: -1, 0.1",
        ),
        (
            lambda: SSLSoftDTW(gamma=-1),
            "SoftDTWLoss: gamma must be finite and >= 0 (0 is hard DTW), got -1",
        ),
        (
            lambda: ContrastiveIDM(math.nan, 0),
            "ContrastiveIDM: margin must be finite and >= 0, got nan",
        ),
        (
            lambda: ContrastiveIDM(1.0, -1),
            "ContrastiveIDM: window must be an integer >= 0, got -1",
        ),
        (
            lambda: contrastive_idm(torch.zeros(3, 4)),
            "contrastive_idm: x must be (B, F, D), got shape (3, 4)",
        ),
        (
            lambda: contrastive_idm(torch.zeros(1, 3, 4), torch.tensor([4])),
            "contrastive_idm: lengths[0] is 4, must be in 1..3 for a tensor of shape (1, 3, 4)",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message


def test_repr_shows_the_configuration():
    assert repr(ContrastiveIDM(1.1, 0)) == "ContrastiveIDM(margin=1.1, window=0)"
