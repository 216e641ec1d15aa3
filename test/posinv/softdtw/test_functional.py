import itertools
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from softdtw_helpers import (
    all_paths,
    brute_force,
    check_no_overflow,
    check_not_finite,
    check_padding,
    check_ties,
    costs_of_lengths,
    outside,
    plain_dtw,
    random_cost,
    valley_cost,
    value_and_gradient,
)

from posinv.errors import InputError
from posinv.softdtw import soft_alignment, soft_dtw

BACKENDS = ("cpu", "torch", "reference")
COMPILED = ("cpu", "torch")
REFERENCES = {}  # what the slow reference gave


def test_brute_force_enumerates_the_delannoy_paths():
    assert [sum(1 for _ in all_paths(n, n)) for n in (1, 2, 3, 4, 5)] == [1, 3, 13, 63, 321]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "m", "bandwidth"),
    [(1, 1, None), (1, 5, None), (5, 1, None), (3, 4, None), (5, 5, None), (4, 5, 1), (5, 4, 2)],
)
@pytest.mark.parametrize("band", ["slanted", "fixed"])
@pytest.mark.parametrize("gamma", [0.05, 1.0, 10.0])
def test_equals_brute_force_over_all_paths(backend, n, m, bandwidth, band, gamma):
    cost = random_cost(1, n, m)
    kwargs = {"gamma": gamma, "bandwidth": bandwidth, "band": band}
    value, gradient = value_and_gradient(cost, backend=backend, **kwargs)
    expected_value, expected_alignment = brute_force(cost[0], gamma, bandwidth, band)
    torch.testing.assert_close(value[0], expected_value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[0], expected_alignment, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_zero_is_hard_dtw_and_its_gradient_one_best_path(backend):
    cost = random_cost(3, 9, 12)
    value, gradient = value_and_gradient(cost, gamma=0, backend=backend)
    torch.testing.assert_close(
        value, torch.tensor([plain_dtw(c.tolist()) for c in cost], dtype=cost.dtype)
    )
    for c, path, v in zip(cost, gradient, value, strict=True):
        cells = [tuple(cell) for cell in path.nonzero().tolist()]
        assert set(path.unique().tolist()) <= {0.0, 1.0}
        assert sorted(cells) == sorted(cells, key=sum)
        assert cells[0] == (0, 0) and cells[-1] == (8, 11)
        assert all(
            max(b - a for a, b in zip(p, q, strict=True)) == 1 for p, q in itertools.pairwise(cells)
        )
        torch.testing.assert_close((c * path).sum(), v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_zero_breaks_ties_by_diagonal_then_up_then_left(backend):
    check_ties(partial(value_and_gradient, backend=backend), 3)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 10.0])
@pytest.mark.parametrize(
    ("bandwidth", "band"),
    [(None, "slanted"), (0, "fixed"), (3, "fixed"), (17, "fixed"), (0, "slanted"), (4, "slanted")],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-11)])
def test_back_ends_agree_with_variable_lengths(backend, gamma, bandwidth, band, dtype, tolerance):
    # Long enough for a narrow band to be stored in blocks, and for the last one to be a part.
    cost = random_cost(5, 141, 138, dtype=torch.float32)
    x_lengths = torch.tensor([141, 17, 1, 20, 33])
    y_lengths = torch.tensor([138, 18, 2, 20, 30])
    if band == "fixed":
        y_lengths = torch.minimum(y_lengths, x_lengths + bandwidth)
        x_lengths = torch.minimum(x_lengths, y_lengths + bandwidth)
    args = (x_lengths, y_lengths, gamma, bandwidth)
    value, gradient = value_and_gradient(cost.to(dtype), *args, backend=backend, band=band)
    case = gamma, bandwidth, band
    if case not in REFERENCES:
        REFERENCES[case] = value_and_gradient(cost.double(), *args, backend="reference", band=band)
    expected_value, expected_gradient = REFERENCES[case]
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=tolerance)
    assert (gradient[outside(cost, x_lengths, y_lengths, bandwidth, band)] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 200)), min_size=1, max_size=3),
    bandwidth=st.none() | st.integers(0, 5),
    band=st.sampled_from(["slanted", "fixed"]),
    gamma=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_compiled_back_ends_agree_on_any_lengths_and_band(
    lengths, bandwidth, band, gamma, scale, seed
):
    cost, x_lengths, y_lengths = costs_of_lengths(lengths, bandwidth, band, scale, seed)
    args = (x_lengths, y_lengths, gamma, bandwidth)
    value, gradient = value_and_gradient(cost, *args, backend="cpu", band=band)
    expected_value, expected_gradient = value_and_gradient(cost, *args, backend="torch", band=band)
    torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_band_wider_than_the_matrix_is_none(backend):
    cost = random_cost(2, 5, 6)
    value = soft_dtw(cost, bandwidth=10**30, backend=backend)
    assert torch.equal(value, soft_dtw(cost, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bandwidth", "band"), [(None, "slanted"), (1, "slanted"), (2, "fixed")])
def test_gradcheck(backend, bandwidth, band):
    cost = random_cost(2, 5, 6).requires_grad_()
    lengths = torch.tensor([5, 3]), torch.tensor([6, 4])
    assert torch.autograd.gradcheck(
        lambda c: soft_dtw(c, *lengths, 0.3, bandwidth, backend, band), cost, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("gamma", [0.05, 1.0])
def test_equals_pysdtw(gamma):
    sdtw_cpu = pytest.importorskip("pysdtw.sdtw_cpu")
    cost = random_cost(3, 23, 31)
    lengths = torch.tensor([[23, 31], [20, 11], [1, 7]])
    value, gradient = value_and_gradient(cost, *lengths.T, gamma)
    # pysdtw's values are float32, and its gradients are right only without padding.
    for b, (n, m) in enumerate(lengths.tolist()):
        one = cost[b : b + 1, :n, :m].clone().requires_grad_()
        expected = sdtw_cpu.SoftDTWcpu.apply(one, lengths[b : b + 1], gamma, 0)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), one)
        torch.testing.assert_close(value[b], expected[0].double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient[b, :n, :m], expected_gradient[0], rtol=0, atol=1e-5)


def test_band_equals_pysdtw_for_equal_lengths():
    sdtw_cpu = pytest.importorskip("pysdtw.sdtw_cpu")
    cost = random_cost(2, 19, 19)
    expected = sdtw_cpu.SoftDTWcpu.apply(cost, torch.tensor([[19, 19]] * 2), 0.1, 4)
    value = soft_dtw(cost, gamma=0.1, bandwidth=4)
    torch.testing.assert_close(value, expected.double(), rtol=1e-6, atol=1e-6)


def test_equals_tslearn():
    tslearn = pytest.importorskip("tslearn.metrics")
    x, y = random_cost(17, 3, seed=1), random_cost(13, 3, seed=2)
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    value = soft_dtw(cost[None], gamma=0.2)
    assert value.item() == pytest.approx(
        tslearn.soft_dtw(x.numpy(), y.numpy(), gamma=0.2), rel=1e-9
    )


@pytest.mark.parametrize("gamma", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_4000_frames_in_float32_are_accurate(gamma, scale):
    cost = valley_cost(4000, 3900, scale)
    value, gradient = value_and_gradient(cost, gamma=gamma, backend="cpu")
    expected_value, expected_gradient = value_and_gradient(
        cost.double(), gamma=gamma, backend="cpu"
    )
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-6, atol=0)
    assert (gradient - expected_gradient).abs().max() < 1e-4
    assert gradient.min() >= 0
    # Every path visits every row and every column.
    assert gradient.sum(1).min() > 0.999 and gradient.sum(2).min() > 0.999


def test_4000_frames_agree_between_back_ends():
    cost = random_cost(1, 4000, 300, seed=3)
    value, gradient = value_and_gradient(cost, gamma=0.05, backend="cpu")
    expected_value, expected_gradient = value_and_gradient(cost, gamma=0.05, backend="torch")
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_costs_do_not_overflow(backend, scale):
    cost = (random_cost(2, 20, 25) * scale).float()
    check_no_overflow(partial(value_and_gradient, backend=backend), cost, (0.01, 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_equals_one_by_one_whatever_the_padding_holds(backend):
    cost = random_cost(4, 30, 25, dtype=torch.float32)
    lengths = torch.tensor([30, 16, 1, 22]), torch.tensor([9, 25, 25, 20])
    check_padding(partial(value_and_gradient, backend=backend), cost, *lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_not_finite_costs_spoil_their_own_utterance_only(backend, bad, gamma):
    cost = random_cost(3, 6, 7, dtype=torch.float32)
    check_not_finite(partial(value_and_gradient, backend=backend), cost, (2, 5), bad, 5, 6, gamma)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    cost = random_cost(2, 8, 9).to(dtype)
    value, gradient = value_and_gradient(cost, gamma=0.5)
    expected_value, expected_gradient = value_and_gradient(cost.float(), gamma=0.5)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_gradient_scales_with_each_utterances_weight_and_layout_does_not_matter():
    cost = random_cost(3, 8, 9)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    transposed = cost.mT.contiguous().requires_grad_()
    (soft_dtw(transposed.mT, gamma=0.2) * weight).sum().backward()
    alignment = soft_alignment(cost, gamma=0.2)
    torch.testing.assert_close(transposed.grad.mT, weight[:, None, None] * alignment)


def test_gradient_is_the_same_where_memory_is_short(monkeypatch):
    cost = random_cost(3, 8, 9)
    args = (torch.tensor([8, 3, 5]), torch.tensor([9, 4, 6]), 0.2)
    value, gradient = value_and_gradient(cost, *args)
    monkeypatch.setattr("posinv.softdtw.functional.has_room", lambda cost: False)
    later_value, later_gradient = value_and_gradient(cost, *args)
    assert torch.equal(later_value, value) and torch.equal(later_gradient, gradient)
    leaf = cost.requires_grad_()
    weighted = (soft_dtw(leaf, *args) * torch.tensor([1.0, -2.0, 0.5])).sum()
    weighted.backward(retain_graph=True)
    weighted.backward()  # the first one changed nothing that was saved
    expected = 2 * torch.tensor([1.0, -2.0, 0.5])[:, None, None] * gradient
    torch.testing.assert_close(leaf.grad, expected)


def test_values_are_the_same_with_and_without_gradient():
    cost = random_cost(3, 50, 40, dtype=torch.float32)
    assert torch.equal(soft_dtw(cost, gamma=0.1), value_and_gradient(cost, gamma=0.1)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    for shape in ((0, 4, 5), (0, 0, 0)):
        cost = torch.zeros(shape, requires_grad=True)
        value = soft_dtw(cost, backend=backend)
        assert value.shape == (0,)
        value.sum().backward()
        assert cost.grad.shape == shape
        assert soft_alignment(cost, backend=backend).shape == shape


def test_third_derivative_raises():
    cost = random_cost(1, 3, 3).requires_grad_()
    (first,) = torch.autograd.grad(soft_dtw(cost.square()).sum(), cost, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_dtw has no third derivative"):
        torch.autograd.grad(second.sum(), cost)


def test_results_do_not_depend_on_the_number_of_threads():
    cost = random_cost(7, 120, 110, dtype=torch.float32)
    x_lengths, y_lengths = torch.arange(60, 121, 10), torch.arange(110, 49, -10)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(cost, x_lengths, y_lengths, 0.1))
    finally:
        torch.set_num_threads(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


COST = torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cost": torch.zeros(4)}, r"soft_dtw: cost must be (B, N, M), got shape (4,)"),
        (
            {"cost": torch.zeros(2, 4, 6, dtype=torch.int64)},
            "soft_dtw: cost must be floating point, got torch.int64",
        ),
        (
            {"x_lengths": torch.tensor([4])},
            "soft_dtw: x_lengths must be (2,) for a tensor of shape (2, 4, 6), got shape (1,)",
        ),
        (
            {"y_lengths": torch.tensor([1.0, 2.0])},
            "soft_dtw: y_lengths must be integers, got torch.float32",
        ),
        (
            {"y_lengths": torch.tensor([6, 0])},
            "soft_dtw: y_lengths[1] is 0, must be in 1..6 for a tensor of shape (2, 4, 6)",
        ),
        (
            {"x_lengths": torch.tensor([5, 0])},
            "soft_dtw: x_lengths[0] is 5, must be in 1..4 for a tensor of shape (2, 4, 6)",
        ),
        (
            {"cost": torch.zeros(1, 0, 3)},
            "soft_dtw: x_lengths[0] is 0, must be at least 1 for a tensor of shape (1, 0, 3)",
        ),
        ({"gamma": -1.0}, "soft_dtw: gamma must be finite and >= 0 (0 is hard DTW), got -1.0"),
        (
            {"gamma": math.nan},
            "soft_dtw: gamma must be finite and >= 0 (0 is hard DTW), got nan",
        ),
        (
            {"bandwidth": -1},
            "soft_dtw: bandwidth must be None (no band) or an integer >= 0, got -1",
        ),
        (
            {"bandwidth": 2.0},
            "soft_dtw: bandwidth must be None (no band) or an integer >= 0, got 2.0",
        ),
        (
            {
                "bandwidth": 1,
                "band": "fixed",
                "x_lengths": torch.tensor([4, 1]),
                "y_lengths": torch.tensor([5, 6]),
            },
            "soft_dtw: no path within bandwidth 1 for batch index 1: its lengths are 1 and 6;"
            ' use a bandwidth of at least 5 for this batch, or band "slanted"',
        ),
        (
            {"bandwidth": 1, "band": "diagonal"},
            "soft_dtw: band must be one of slanted, fixed, got 'diagonal'",
        ),
        (
            {"backend": "gpu"},
            "soft_dtw: backend must be one of auto, cpu, cuda, torch, reference, got 'gpu'",
        ),
        (
            {"cost": torch.zeros(1, 2, 3, device="meta"), "backend": "cpu"},
            'soft_dtw: backend "cpu" got a cost on meta; use "auto" or "torch"',
        ),
        (
            {"backend": "cuda"},
            'soft_dtw: backend "cuda" got a cost on cpu; use "auto" or "torch"',
        ),
    ],
)
def test_bad_input_is_one_line(kwargs, message):
    with pytest.raises(InputError) as error:
        soft_dtw(**{"cost": COST, **kwargs})
    assert str(error.value) == message


def test_soft_alignment_names_itself_in_errors():
    with pytest.raises(InputError, match=r"^soft_alignment: cost must be \(B, N, M\)"):
        soft_alignment(torch.zeros(3))


def test_importing_imports_neither_espnet_nor_transformers_nor_numba():
    code = (
        "import sys, posinv.softdtw\n"
        "print({'espnet', 'espnet2', 'transformers', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "set()"


def test_torch_keeps_its_number_of_threads():
    code = (
        "import torch; torch.set_num_threads(1); from posinv.softdtw import soft_dtw; "
        "soft_dtw(torch.rand(3, 5, 4)); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
