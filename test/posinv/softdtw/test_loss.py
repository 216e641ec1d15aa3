import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from posinv.errors import InputError
from posinv.softdtw import SoftDTWLoss, soft_dtw


def features(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def direct_cost(x, y, cost):
    """Distances by subtraction, in a tensor (B, N, M, D) that the loss does without."""
    if cost == "cosine":
        return 1 - F.cosine_similarity(x[:, :, None], y[:, None], dim=-1, eps=1e-300)
    return (x[:, :, None] - y[:, None]).square().sum(-1)


def direct_loss(x, y, x_lengths, y_lengths, gamma, divergence, cost):
    def of(a, b, a_lengths, b_lengths):
        return soft_dtw(direct_cost(a, b, cost), a_lengths, b_lengths, gamma, backend="torch")

    loss = of(x, y, x_lengths, y_lengths)
    if divergence:
        loss = loss - (of(x, x, x_lengths, x_lengths) + of(y, y, y_lengths, y_lengths)) / 2
    return loss


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("divergence", [True, False])
def test_equals_the_direct_formula_in_value_and_gradient(cost, divergence):
    x = (features(3, 9, 5) + 2).requires_grad_()
    y = (features(3, 11, 5, seed=1) + 2).requires_grad_()
    lengths = torch.tensor([9, 4, 1]), torch.tensor([3, 11, 1])
    loss = SoftDTWLoss(0.3, divergence, cost)(x, y, *lengths)
    expected = direct_loss(x, y, *lengths, 0.3, divergence, cost)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    weight = torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64)
    gradients = torch.autograd.grad((loss * weight).sum(), (x, y))
    expected = torch.autograd.grad((expected * weight).sum(), (x, y))
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_gradcheck(cost):
    x, y = features(2, 5, 3).requires_grad_(), features(2, 4, 3, seed=1).requires_grad_()
    lengths = torch.tensor([5, 3]), torch.tensor([2, 4])
    assert torch.autograd.gradcheck(
        lambda x, y: SoftDTWLoss(0.5, cost=cost)(x, y, *lengths), (x, y)
    )


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_divergence_of_a_sequence_from_itself_is_zero(cost, offset):
    x = (features(2, 300, 64) + offset).float().requires_grad_()
    loss = SoftDTWLoss(0.1, cost=cost)
    value = loss(x, x.detach().clone())
    scale = soft_dtw(torch.full((2, 300, 300), 2 * 64.0 if cost == "sqeuclidean" else 1.0), gamma=0)
    assert (value.abs() < 1e-7 * scale).all()
    (gradient,) = torch.autograd.grad(value.sum(), x)
    (typical,) = torch.autograd.grad(loss(x, x.detach().flip(1)).sum(), x)
    assert gradient.norm() < 1e-5 * typical.norm()


def test_frames_that_are_nearly_equal_keep_their_digits_far_from_the_origin():
    x = 50 + 1e-2 * features(1, 40, 64)
    y = x + 1e-3 * features(1, 40, 64, seed=1)
    loss = SoftDTWLoss(0.001, divergence=False)
    exact = (x.float().double()[:, :, None] - y.float().double()[:, None]).square().sum(-1)
    expected = soft_dtw(exact, gamma=0.001, backend="torch")
    value = loss(x.float(), y.float())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    gamma=st.sampled_from([0.0, 0.01, 0.1, 1.0, 10.0]),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_divergence_is_not_negative_and_symmetric(n, m, gamma, scale, seed):
    x, y = scale * features(2, n, 3, seed=seed), scale * features(2, m, 3, seed=seed + 1)
    loss = SoftDTWLoss(gamma)
    value = loss(x, y)
    assert (value > -1e-9).all()
    torch.testing.assert_close(value, loss(y, x), rtol=1e-9, atol=1e-9)


def test_batch_equals_one_by_one_and_padding_is_not_read():
    x, y = features(3, 20, 8), features(3, 25, 8, seed=1)
    x_lengths, y_lengths = torch.tensor([20, 7, 1]), torch.tensor([6, 25, 2])
    x[1, 7:] = x[2, 1:] = torch.nan
    y[0, 6:] = y[2, 2:] = torch.inf
    x.requires_grad_()
    y.requires_grad_()
    loss = SoftDTWLoss()
    value = loss(x, y, x_lengths, y_lengths)
    gradients = torch.autograd.grad(value.sum(), (x, y))
    for b, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        a, c = x[b : b + 1, :n], y[b : b + 1, :m]
        one = loss(a, c)
        torch.testing.assert_close(value[b], one[0], rtol=1e-12, atol=1e-12)
        for gradient, expected, length in zip(
            gradients, torch.autograd.grad(one, (a, c)), (n, m), strict=True
        ):
            torch.testing.assert_close(gradient[b, :length], expected[0], rtol=1e-9, atol=1e-11)
            assert (gradient[b, length:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    x = features(2, 9, 16).to(dtype).requires_grad_()
    y = features(2, 7, 16, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = SoftDTWLoss()(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, SoftDTWLoss()(x.float(), y.float()))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()


class Products(TorchDispatchMode):
    """Records the types of matrix products."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.types |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_distances_are_exact_whatever_products_are():
    """Where torch would multiply float32 in a lower precision, products are float64."""
    x = (features(2, 90, 256) / 16).float().requires_grad_()
    y = (features(2, 70, 256, seed=1) / 16).float()

    def computed():
        with Products() as products:
            loss = SoftDTWLoss()(x, y)
            return products.types, loss.detach(), *torch.autograd.grad(loss.sum(), x)

    types, *expected = computed()
    assert types == {torch.float32}
    torch.set_float32_matmul_precision("medium")
    try:
        types, *found = computed()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert types == {torch.float64}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_frames_of_zeros_have_a_finite_cosine_gradient():
    x = features(1, 6, 4)
    x[0, 2] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(SoftDTWLoss(cost="cosine")(x, features(1, 5, 4)).sum(), x)
    assert gradient.isfinite().all() and (gradient[0, 2] == 0).all() and gradient.any()


def test_bandwidth_and_backend_are_passed_on():
    x, y = features(2, 9, 4), features(2, 7, 4, seed=1)
    cost = direct_cost(x, y, "sqeuclidean")
    for backend in ("cpu", "torch", "reference"):
        value = SoftDTWLoss(0.1, False, bandwidth=2, backend=backend)(x, y)
        expected = soft_dtw(cost, gamma=0.1, bandwidth=2, backend="reference")
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_empty_batch():
    x, y = torch.zeros(0, 4, 3, requires_grad=True), torch.zeros(0, 5, 3)
    value = SoftDTWLoss()(x, y)
    assert value.shape == (0,)
    value.sum().backward()
    assert x.grad.shape == (0, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SoftDTWLoss(gamma=-0.5),
            "SoftDTWLoss: gamma must be finite and >= 0 (0 is hard DTW), got -0.5",
        ),
        (
            lambda: SoftDTWLoss(cost="euclidean"),
            "SoftDTWLoss: cost must be one of sqeuclidean, cosine, or a function of x and y, "
            "got 'euclidean'",
        ),
        (
            lambda: SoftDTWLoss(backend="gpu"),
            "SoftDTWLoss: backend must be one of auto, cpu, cuda, torch, reference, got 'gpu'",
        ),
        (
            lambda: SoftDTWLoss(bandwidth=3, band="sloped"),
            "SoftDTWLoss: band must be one of slanted, fixed, got 'sloped'",
        ),
        (
            lambda: SoftDTWLoss(bandwidth=-2),
            "SoftDTWLoss: bandwidth must be None (no band) or an integer >= 0, got -2",
        ),
        (
            lambda: SoftDTWLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)),
            "SoftDTWLoss: x must be (B, N, D) and y (B, M, D), got shapes (2, 3, 4) and (2, 3, 5)",
        ),
        (
            lambda: SoftDTWLoss()(torch.zeros(2, 3, 4), torch.zeros(3, 4)),
            "SoftDTWLoss: x must be (B, N, D) and y (B, M, D), got shapes (2, 3, 4) and (3, 4)",
        ),
        (
            lambda: SoftDTWLoss()(torch.zeros(1, 3, 4).long(), torch.zeros(1, 3, 4)),
            "SoftDTWLoss: x must be floating point, got torch.int64",
        ),
        (
            lambda: SoftDTWLoss()(
                torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), y_lengths=torch.tensor([0])
            ),
            "SoftDTWLoss: y_lengths[0] is 0, must be in 1..3 for a tensor of shape (1, 3, 4)",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message


def test_repr_shows_the_configuration():
    assert repr(SoftDTWLoss(0.2, cost="cosine")) == (
        "SoftDTWLoss(gamma=0.2, divergence=True, cost='cosine', bandwidth=None, band='slanted',"
        " backend='auto',"
        " normalize_features=False, normalize_length=False)"
    )


def test_cost_may_be_a_function():
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 5, 3)
    lengths = [6, 3], [2, 5]

    def squared(x, y):
        return (x[:, :, None] - y[:, None]).square().sum(3)

    for divergence in (True, False):
        found = SoftDTWLoss(0.3, divergence, squared)(x, y, *lengths)
        expected = SoftDTWLoss(0.3, divergence)(x, y, *lengths)
        torch.testing.assert_close(found, expected)
        for loss in (found, expected):
            loss.sum().backward()
        torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match=r"return \(B, N, M\), here \(2, 6, 5\), got \(2, 6\)"):
        SoftDTWLoss(cost=lambda x, y: x[:, :, 0])(x, y)


def test_learned_gamma_is_refused():
    gamma = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(InputError, match="gamma cannot be learned"):
        SoftDTWLoss(gamma)
    with pytest.raises(InputError, match="gamma cannot be learned"):
        soft_dtw(torch.zeros(1, 2, 2), gamma=gamma)
    assert SoftDTWLoss(np.float32(0.5)).gamma == 0.5


def test_numpy_integers_are_integers():
    cost = torch.rand(2, 4, 4)
    expected = soft_dtw(cost, torch.tensor([4, 3]), torch.tensor([3, 4]), bandwidth=2)
    found = soft_dtw(cost, np.array([4, 3], np.int32), [3, 4], bandwidth=np.int64(2))
    assert torch.equal(found, expected)


def test_threads_leave_torchs_precision_alone():
    """Other threads see no other precision setting while a loss is computed."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 300, 64), torch.randn(2, 280, 64)
    expected = SoftDTWLoss()(x, y)
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(
                (torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision)
            )

    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision
        with ThreadPoolExecutor(3) as pool:
            watcher = pool.submit(watch)
            losses = list(pool.map(lambda _: SoftDTWLoss()(x, y), range(8)))
            done.set()
            watcher.result()
        assert seen == {before}
    finally:
        done.set()
        torch.set_float32_matmul_precision("highest")
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
