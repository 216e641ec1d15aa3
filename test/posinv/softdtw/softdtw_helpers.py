"""What the soft-DTW tests share: costs, oracles, and checks that every back end must pass.

The checks take a function ``align(cost, x_lengths=None, y_lengths=None, gamma=1.0,
bandwidth=None, band="slanted")`` that returns values and expected alignments.
"""

from fractions import Fraction
from functools import cache

import torch

from posinv.softdtw import soft_dtw
from posinv.softdtw.band import make_band


def random_cost(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)


def costs_of_lengths(lengths, bandwidth, band, scale, seed):
    """Padded costs of pairs of lengths, cut so that they fit a fixed band; the lengths (B,) twice.

    The lengths are not contiguous in memory.
    """
    x_lengths, y_lengths = torch.tensor(lengths).T
    if bandwidth is not None and band == "fixed":
        y_lengths = torch.minimum(y_lengths, x_lengths + bandwidth)
        x_lengths = torch.minimum(x_lengths, y_lengths + bandwidth)
    shape = len(lengths), int(x_lengths.max()) + 2, int(y_lengths.max()) + 1
    return random_cost(*shape, seed=seed) * scale, x_lengths, y_lengths


def valley_cost(n, m, scale):
    """One float32 cost (1, n, m), as of similar utterances: low along the diagonal."""
    position = torch.arange(n)[:, None] * (m / n) - torch.arange(m)
    valley = 1 - torch.exp(-((position / 30) ** 2))
    return (scale * (0.5 * valley + random_cost(n, m))[None]).float()


def in_band(i, j, n, m, bandwidth, band):
    """Whether a cell is in a band, by the definition in words."""
    if bandwidth is None:
        return True
    if band == "fixed":
        return abs(i - j) <= bandwidth
    if n > m:  # for each frame of the longer sequence, those of the shorter one
        i, j, n, m = j, i, m, n
    line = Fraction(j * (n - 1), max(m - 1, 1))
    return abs(i - line) <= bandwidth + Fraction(1, 2)


def outside(cost, x_lengths, y_lengths, bandwidth=None, band="slanted"):
    """Whether cells (B, N, M) are outside the lengths or the band."""
    found = torch.ones(cost.shape, dtype=torch.bool)
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist(), strict=True)):
        found[b, :n, :m] = _outside(n, m, bandwidth, band)
    return found


@cache
def _outside(n, m, bandwidth, band):
    cells = [[not in_band(i, j, n, m, bandwidth, band) for j in range(m)] for i in range(n)]
    return torch.tensor(cells)


def run_back_end(
    module, cost, x_lengths, y_lengths, gamma, bandwidth, with_alignment=True, band="slanted"
):
    """What a back end gives for whole costs: values and whole alignments."""
    cells = make_band(x_lengths, y_lengths, *cost.shape[1:], bandwidth, band, True)
    columns = cells.columns(cost.device)
    value, alignment = module.align(cost.gather(2, columns), cells, gamma, with_alignment)
    if with_alignment:
        alignment = torch.zeros_like(cost).scatter(2, columns, alignment)
    return value, alignment


def value_and_gradient(cost, *args, **kwargs):
    cost = cost.detach().clone().requires_grad_()
    value = soft_dtw(cost, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    return value.detach(), gradient


# ------------------------------------------------------------------------------------ the oracles
def all_paths(n, m, bandwidth=None, band="slanted"):
    """Every monotonic path from (0, 0) to (n - 1, m - 1) as a list of cells."""

    def extend(path):
        i, j = path[-1]
        if (i, j) == (n - 1, m - 1):
            yield path
        for cell in ((i + 1, j + 1), (i + 1, j), (i, j + 1)):
            if cell[0] < n and cell[1] < m:
                yield from extend([*path, cell])

    for path in extend([(0, 0)]):
        if all(in_band(i, j, n, m, bandwidth, band) for i, j in path):
            yield path


def brute_force(cost, gamma, bandwidth=None, band="slanted"):
    """Value and expected alignment of an (n, m) cost, by enumerating the paths."""
    visits = torch.stack(
        [
            torch.zeros_like(cost).index_put_(
                tuple(torch.tensor(path).T), torch.tensor(1.0).to(cost)
            )
            for path in all_paths(*cost.shape, bandwidth, band)
        ]
    )
    totals = (visits * cost).sum(dim=(1, 2))
    value = -gamma * torch.logsumexp(-totals / gamma, dim=0)
    share = torch.softmax(-totals / gamma, dim=0)
    return value, (share[:, None, None] * visits).sum(0)


def plain_dtw(cost):
    """DTW of an (n, m) nested list by recursion on the definition."""
    memory = {}

    def best(i, j):
        if (i, j) not in memory:
            before = [
                best(*cell) for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(cell) >= 0
            ]
            memory[i, j] = cost[i][j] + min(before, default=0.0)
        return memory[i, j]

    return best(len(cost) - 1, len(cost[0]) - 1)


# ------------------------------------------------------------------------------------- the checks
def check_ties(align, size):
    """With gamma 0, ties are broken by diagonal, then up, then left."""
    assert torch.equal(align(torch.zeros(1, size, size), gamma=0)[1][0], torch.eye(size))
    # From the corner: diagonal steps as long as there are any, then along the edge.
    wide = align(torch.zeros(1, 2, 4), gamma=0)[1]
    assert wide[0].tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]
    # (2, 1) can come from (1, 0), at 1, or from (1, 1) or (2, 0), at 0: up is taken.
    chosen = align(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]]), gamma=0)[1]
    assert chosen[0].tolist() == [[1, 0], [0, 1], [0, 1]]


def check_no_overflow(align, cost, gammas):
    for gamma in gammas:
        value, alignment = align(cost, gamma=gamma)
        assert value.isfinite().all() and alignment.isfinite().all()
        assert (alignment.sum(1) > 1 - 1e-5).all()


def check_padding(align, cost, x_lengths, y_lengths):
    """A batch equals its utterances one by one, whatever the padding holds."""
    padding = outside(cost, x_lengths, y_lengths)
    value, alignment = align(cost.masked_fill(padding, torch.nan), x_lengths, y_lengths, 0.1)
    assert (alignment[padding] == 0).all()
    for b, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        one, one_alignment = align(cost[b : b + 1, :n, :m], gamma=0.1)
        assert value[b] == one[0]
        assert torch.equal(alignment[b, :n, :m], one_alignment[0])


def check_not_finite(align, cost, cell, bad, n, m, gamma):
    """Of three utterances, one of n by m frames with a bad cell becomes NaN, the others do not."""
    cost[1, *cell] = bad
    N, M = cost.shape[1:]
    lengths = torch.tensor([N, n, N]), torch.tensor([M, m, M])
    value, alignment = align(cost, *lengths, gamma)
    assert value.isnan().tolist() == [False, True, False]
    assert alignment[[0, 2]].isfinite().all()
    assert alignment[1, :n, :m].isnan().all()
    assert (alignment[1, n:] == 0).all() and (alignment[1, :, m:] == 0).all()
    lag = abs(cell[0] - cell[1])
    if lag > max(N, M) - min(N, M):  # in a narrower band, the cell is outside
        for found in align(cost, *lengths, gamma, lag - 1, band="fixed"):
            assert found.isfinite().all()
