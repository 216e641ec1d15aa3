import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from softdtw_helpers import brute_force, in_band, random_cost

from posinv.softdtw import SoftDTWLoss, soft_alignment, soft_dtw
from posinv.softdtw.band import ROWS, make_band

LENGTHS = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=3)


def band_of(lengths, bandwidth, band, known=True):
    x_lengths, y_lengths = torch.tensor(lengths).T
    shape = int(x_lengths.max()) + 1, int(y_lengths.max()) + 2
    return make_band(x_lengths, y_lengths, *shape, bandwidth, band, known)


def cells_of(band, b):
    """The cells (i, j) of one pair that are inside its band."""
    columns = band.columns()
    return {(i, int(columns[b, i, k])) for i, k in band.inside()[b].nonzero().tolist()}


@settings(max_examples=80, deadline=None)
@given(
    lengths=LENGTHS,
    bandwidth=st.none() | st.integers(0, 30),
    band=st.sampled_from(["slanted", "fixed"]),
    known=st.booleans(),
)
def test_the_cells_inside_are_all_stored(lengths, bandwidth, band, known):
    stored = band_of(lengths, bandwidth, band, known)
    assert stored.columns().min() >= 0 and stored.columns().max() < stored.M
    for b, (n, m) in enumerate(lengths):
        assert cells_of(stored, b) == {
            (i, j) for i in range(n) for j in range(m) if in_band(i, j, n, m, bandwidth, band)
        }


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 60), m=st.integers(1, 300), bandwidth=st.integers(0, 5))
def test_a_slanted_band_always_has_a_path_and_is_the_same_either_way(n, m, bandwidth):
    cells = cells_of(band_of([(n, m)], bandwidth, "slanted"), 0)
    assert {(0, 0), (n - 1, m - 1)} <= cells
    reached = set()
    for i, j in sorted(cells):
        if (i, j) == (0, 0) or reached & {(i - 1, j - 1), (i - 1, j), (i, j - 1)}:
            reached.add((i, j))
    assert reached == cells
    assert {(j, i) for i, j in cells} == cells_of(band_of([(m, n)], bandwidth, "slanted"), 0)
    assert len(cells) <= max(n, m) * (2 * bandwidth + 2)
    equal = [cells_of(band_of([(n, n)], bandwidth, band), 0) for band in ("slanted", "fixed")]
    assert equal[0] == equal[1]


def test_long_bands_take_little_room():
    for band in ("slanted", "fixed"):
        stored = band_of([(8000, 7990), (7200, 7900)], 100, band)
        assert stored.width < 2 * 100 + 1 + 2 * ROWS


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    gamma=st.sampled_from([0.0, 0.1, 1.0]),
    band=st.sampled_from(["slanted", "fixed"]),
    seed=st.integers(0, 2**31),
)
def test_a_wide_band_is_none(lengths, gamma, band, seed):
    x_lengths, y_lengths = torch.tensor(lengths).T
    longest = int(x_lengths.max()), int(y_lengths.max())
    cost = random_cost(len(lengths), *longest, seed=seed)
    args = cost, x_lengths, y_lengths, gamma
    wide = soft_dtw(*args, bandwidth=max(longest), band=band)
    assert torch.equal(wide, soft_dtw(*args))
    wide = soft_alignment(*args, bandwidth=max(longest), band=band)
    assert torch.equal(wide, soft_alignment(*args))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 150), bandwidth=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_for_equal_lengths_both_bands_are_the_same(n, bandwidth, seed):
    cost = random_cost(2, n, n, seed=seed)
    slanted, fixed = (
        soft_dtw(cost, gamma=0.1, bandwidth=bandwidth, band=band) for band in ("slanted", "fixed")
    )
    assert torch.equal(slanted, fixed)
    if bandwidth == 0:  # the diagonal
        expected = cost.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(slanted, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("band", ["slanted", "fixed"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_ragged_pairs_equal_brute_force(backend, band):
    lengths = [(5, 6), (1, 3), (4, 2), (6, 6), (3, 1), (1, 1), (2, 4)]
    x_lengths, y_lengths = torch.tensor(lengths).T
    cost = random_cost(len(lengths), 6, 6)
    for bandwidth in (0, 1, 2) if band == "slanted" else (2, 3):
        args = x_lengths, y_lengths, 0.3, bandwidth, backend, band
        value, alignment = soft_dtw(cost, *args), soft_alignment(cost, *args)
        for b, (n, m) in enumerate(lengths):
            expected = brute_force(cost[b, :n, :m], 0.3, bandwidth, band)
            torch.testing.assert_close(value[b], expected[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(alignment[b, :n, :m], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize(("bandwidth", "band"), [(2, "slanted"), (8, "fixed")])
def test_features_give_what_their_whole_cost_gives(backend, cost, bandwidth, band):
    """The costs of a band, in blocks of rows, and their gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 150, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 170, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([150, 1, 130]), torch.tensor([143, 2, 137])
    if band == "slanted":
        lengths[1][0], lengths[1][1] = 170, 1

    def whole(x, y):
        if cost == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=3)
        return (x[:, :, None] - y[:, None]).square().sum(3)

    args = {"bandwidth": bandwidth, "band": band, "backend": backend}
    results = []
    for given_cost in (cost, whole):
        loss = SoftDTWLoss(0.2, cost=given_cost, **args)(x, y, *lengths)
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        results.append((loss, *torch.autograd.grad((loss * weights).sum(), (x, y))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("band", ["slanted", "fixed"])
def test_divergence_of_a_sequence_from_itself_is_zero_in_a_band(band):
    x = random_cost(2, 200, 8, dtype=torch.float32).requires_grad_()
    loss = SoftDTWLoss(bandwidth=3, band=band)
    value = loss(x, x.detach().clone())
    assert value.abs().max() < 1e-3
    assert torch.autograd.grad(value.sum(), x)[0].abs().max() < 1e-3


def test_costs_outside_a_band_are_not_read():
    cost = random_cost(1, 150, 140)
    expected = soft_dtw(cost, gamma=0.1, bandwidth=3)
    far = (torch.arange(150)[:, None] - torch.arange(140)).abs() > 20
    assert torch.equal(soft_dtw(cost.masked_fill(far, math.nan), gamma=0.1, bandwidth=3), expected)


def test_memory_of_features_is_that_of_the_band():
    """Without a band there would be six arrays of 4,000 by 4,000 values, 64 MB each."""
    code = """
import resource, torch
from posinv.softdtw import SoftDTWLoss
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(frames):
    x, y = torch.rand(1, frames, 8, requires_grad=True), torch.rand(1, frames, 8)
    SoftDTWLoss(bandwidth=50)(x, y).sum().backward()
run(300)
before = peak()
run(4000)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60
