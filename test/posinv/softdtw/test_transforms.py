"""torch.func, torch.compile, second derivatives, unbatched inputs and PackedSequence."""

import pytest
import torch
from softdtw_helpers import random_cost
from torch.func import grad, jacrev, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from posinv.errors import InputError
from posinv.losses import ContrastiveIDM
from posinv.losses.functional import contrastive_idm, ssl_mse, ssl_softdtw, ssl_xcorr
from posinv.softdtw import SoftDTWLoss, soft_alignment, soft_dtw

BANDS = [(None, "slanted"), (1, "slanted"), (2, "fixed")]
# Long enough for a band to be stored in blocks.
LONG = {"bandwidth": 2, "band": "slanted"}
LOSSES = {
    "soft_dtw": SoftDTWLoss(0.3),
    "soft_dtw in a band": SoftDTWLoss(0.3, **LONG),
    "soft_dtw in a fixed band": SoftDTWLoss(0.3, bandwidth=10, band="fixed"),
    "cosine": SoftDTWLoss(0.3, cost="cosine"),
    "ssl_softdtw": ssl_softdtw,
    "ssl_mse": lambda x, y: ssl_mse(x, y[:, : x.shape[1]]),
    "ssl_xcorr": lambda x, y: ssl_xcorr(x, y[:, : x.shape[1]]),
    "contrastive_idm": lambda x, y: contrastive_idm(x),
}


def features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("bandwidth", "band"), BANDS)
@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_second_derivative_by_finite_differences(backend, bandwidth, band, gamma):
    cost = random_cost(2, 3, 4).requires_grad_()
    lengths = torch.tensor([3, 2]), torch.tensor([4, 3])
    args = *lengths, gamma, bandwidth, backend, band
    for function in (soft_dtw, lambda *a: soft_alignment(*a).square()):
        check = torch.autograd.gradgradcheck if function is soft_dtw else torch.autograd.gradcheck
        assert check(lambda c: function(c, *args), cost, rtol=1e-6, atol=1e-8)  # noqa: B023


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize(("bandwidth", "band"), BANDS)
def test_second_derivative_in_features(cost, bandwidth, band):
    x, y = features(2, 4, 2).requires_grad_(), features(2, 5, 2, seed=1).requires_grad_()
    loss = SoftDTWLoss(0.5, cost=cost, bandwidth=bandwidth, band=band)
    assert torch.autograd.gradgradcheck(lambda x, y: loss(x, y, [4, 3], [5, 2]), (x, y))


def test_batched_gradients_equal_one_by_one():
    cost = random_cost(2, 5, 6).requires_grad_()
    value = soft_dtw(cost, gamma=0.2)
    jacobian = torch.autograd.grad(
        value, cost, torch.eye(2, dtype=cost.dtype), retain_graph=True, is_grads_batched=True
    )[0]
    for b in range(2):
        (one,) = torch.autograd.grad(value[b], cost, retain_graph=True)
        torch.testing.assert_close(jacobian[b], one)


def test_second_derivative_of_a_stored_band():
    """The same as that of the whole cost: a gradient penalty and its gradient."""
    x, y = features(2, 100, 3).requires_grad_(), features(2, 110, 3, seed=1).requires_grad_()

    def penalty(cost):
        value = SoftDTWLoss(0.5, cost=cost, **LONG)(x, y)
        first = torch.autograd.grad(value.sum(), (x, y), create_graph=True)
        total = sum(g.square().sum() for g in first)
        return total.detach(), *torch.autograd.grad(total, (x, y))

    whole = penalty(lambda x, y: (x[:, :, None] - y[:, None]).square().sum(3))
    for found, expected in zip(penalty("sqeuclidean"), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_second_derivative_of_hard_dtw_is_zero():
    cost = random_cost(1, 4, 5).requires_grad_()
    (first,) = torch.autograd.grad(soft_dtw(cost, gamma=0).sum(), cost, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), cost)
    assert first.any() and not second.any()


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_and_grad_equal_a_loop(name):
    loss = LOSSES[name]
    x, y = features(3, 2, 100, 3), features(3, 2, 110, 3, seed=1)
    expected = torch.stack([loss(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(vmap(loss)(x, y), expected)
    torch.testing.assert_close(
        vmap(loss, in_dims=(0, None))(x, y[0]), torch.stack([loss(a, y[0]) for a in x])
    )

    leaf = x.clone().requires_grad_()
    losses = torch.stack([loss(a, b) for a, b in zip(leaf, y, strict=True)])
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)

    def total(a, b):
        return loss(a, b).sum()

    torch.testing.assert_close(grad(total)(x[0], y[0]), slopes[0])
    torch.testing.assert_close(vmap(grad(total))(x, y), slopes)
    torch.testing.assert_close(grad(lambda a, b: vmap(loss)(a, b).sum())(x, y), slopes)
    _, pull = vjp(loss, x[0], y[0])
    torch.testing.assert_close(pull(torch.ones(2, dtype=x.dtype))[0], slopes[0])
    jacobian = jacrev(loss)(x[0], y[0])
    assert jacobian.shape == (2, 2, 100, 3)
    torch.testing.assert_close(jacobian.sum(0), slopes[0])


@pytest.mark.parametrize(("bandwidth", "band"), BANDS)
def test_jacobian_of_the_gradient(bandwidth, band):
    cost = random_cost(1, 4, 5)

    def value(c):
        return soft_dtw(c, gamma=0.4, bandwidth=bandwidth, band=band)[0]

    found = jacrev(grad(value))(cost)
    expected = torch.autograd.functional.hessian(value, cost)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(jacrev(jacrev(value))(cost), expected)


def test_vmap_over_lengths():
    cost = random_cost(3, 2, 5, 6)
    x_lengths = torch.tensor([[5, 3], [2, 4], [1, 5]])
    y_lengths = torch.tensor([[6, 3], [4, 4], [1, 5]])
    for kwargs in ({}, {"bandwidth": 1}, {"bandwidth": 3, "band": "fixed"}):

        def value(c, n, m, kwargs=kwargs):
            return soft_dtw(c, n, m, 0.2, **kwargs)

        found = vmap(value)(cost, x_lengths, y_lengths)
        expected = [value(*args) for args in zip(cost, x_lengths, y_lengths, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(InputError, match=r"the lengths of batch index 0 must be in 1\.\.5 and"):
        vmap(soft_dtw)(cost, x_lengths + 9, y_lengths)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_whole(name):
    loss = LOSSES[name]
    x, y = features(2, 100, 3).requires_grad_(), features(2, 110, 3, seed=1).requires_grad_()
    expected = loss(x, y)
    wanted = (x,) if name == "contrastive_idm" else (x, y)
    slopes = torch.autograd.grad(expected.sum(), wanted)
    torch.compiler.reset()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), wanted), slopes)


def test_compiled_with_lengths():
    loss, regulariser = SoftDTWLoss(0.3, **LONG), ContrastiveIDM(1.0, 0)
    x, y = features(2, 100, 3).requires_grad_(), features(2, 110, 3, seed=1)
    lengths = torch.tensor([100, 40]), torch.tensor([90, 50])

    def total(x, y, n, m):
        return loss(x, y, n, m) + regulariser(x, n)

    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for n, m in (lengths, (lengths[0] - 3, lengths[1] + 2)):
        found, expected = compiled(x, y, n, m), total(x, y, n, m)
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(value.sum(), x)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes)
    with pytest.raises(InputError, match="the lengths of batch index 1 must be in"):
        compiled(x, y, torch.tensor([3, 0]), lengths[1])


def test_one_sequence_is_a_batch_of_one():
    x, y = features(9, 4), features(7, 4, seed=1)
    for loss in (SoftDTWLoss(), ssl_softdtw):
        assert loss(x, y).shape == ()
        assert torch.equal(loss(x, y), loss(x[None], y[None])[0])
        assert torch.equal(loss(x, y, 5, torch.tensor(3)), loss(x[None], y[None], [5], [3])[0])
    pairs = x.expand(2, 9, 4), y.expand(2, 7, 4)
    torch.testing.assert_close(vmap(SoftDTWLoss())(*pairs), SoftDTWLoss()(*pairs))
    cost = random_cost(6, 5)
    assert torch.equal(soft_dtw(cost, 4, 3), soft_dtw(cost[None], [4], [3])[0])
    assert torch.equal(soft_alignment(cost, 4, 3), soft_alignment(cost[None], [4], [3])[0])
    with pytest.raises(InputError, match=r"got shapes \(9, 4\) and \(1, 7, 4\)"):
        SoftDTWLoss()(x, y[None])


def test_packed_sequences():
    sequences = [features(n, 4, seed=n) for n in (3, 9, 1)]
    others = [features(n, 4, seed=n + 20) for n in (5, 2, 4)]
    x, y = (pack_sequence(s, enforce_sorted=False) for s in (sequences, others))
    found = SoftDTWLoss()(x, y)
    expected = [SoftDTWLoss()(a, b) for a, b in zip(sequences, others, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(ssl_softdtw(x, y), SoftDTWLoss(normalize_features=True)(x, y))
    padded = features(2, 6, 4)
    packed = pack_padded_sequence(padded, torch.tensor([6, 4]), batch_first=True)
    torch.testing.assert_close(SoftDTWLoss()(packed, padded), SoftDTWLoss()(padded, padded, [6, 4]))
    with pytest.raises(InputError, match="x is a PackedSequence, which has its lengths"):
        SoftDTWLoss()(x, y, [3, 9, 1])
