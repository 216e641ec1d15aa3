import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.losses.functional import effective_rank, frame_distance


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
    assert torch.equal(measure(x.nan_to_num(7, 7), lengths), together)


@pytest.mark.parametrize("measure", [frame_distance, effective_rank])
def test_single_frame_and_silence_are_finite(measure):
    assert measure(torch.zeros(2, 4, 3), torch.tensor([1, 4])).isfinite().all()
