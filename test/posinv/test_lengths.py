import math

import torch
from torch.func import vmap

from posinv.lengths import checked_lengths, zero_beyond


def test_lengths_that_vmap_maps_over_are_set_to_0_where_they_are_out_of_range():
    def check(lengths):
        return checked_lengths("lengths", lengths, 1, 5, torch.zeros(1, 5))

    lengths = torch.tensor([[0], [1], [5], [6]])
    assert vmap(check)(lengths).flatten().tolist() == [0, 1, 5, 0]


def test_what_is_beyond_becomes_0():
    x = torch.arange(1.0, 31.0).reshape(2, 3, 5)
    expected = x.clone()
    expected[0, :, 1:] = 0.0
    x[0, :, 1:] = math.nan
    assert torch.equal(zero_beyond(x, torch.tensor([1, 5])), expected)
    assert torch.equal(zero_beyond(x[:, 0], torch.tensor([1, 5])), expected[:, 0])
