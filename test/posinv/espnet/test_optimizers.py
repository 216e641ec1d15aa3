"""S3PRL's optimiser and schedule."""

import copy
import math

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from posinv.espnet.optimizers import LinearWarmupDecay, S3PRLAdamW


def gradient(step):
    """Gradients of 1, 1e-4, 1e-6 and 0, of changing sign, for epsilon to matter."""
    rng = torch.Generator().manual_seed(step)
    return torch.tensor([1.0, 1e-4, 1e-6, 0.0]) * torch.randn(4, generator=rng)


def test_adamw_by_its_formula():
    """By hand in float64: epsilon is added before the second moment's bias is corrected."""
    rate, eps, decay = 0.1, 1e-7, 0.01
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = S3PRLAdamW([weight], lr=rate, eps=eps, weight_decay=decay)
    assert S3PRLAdamW([weight]).defaults["weight_decay"] == 0
    expected, m, v = torch.ones(4).double(), torch.zeros(4), torch.zeros(4)
    for step in range(1, 30):
        if step == 10:  # resumed from a checkpoint
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = S3PRLAdamW([weight], lr=rate, eps=eps, weight_decay=decay)
            optimizer.load_state_dict(state)
        weight.grad = gradient(step)
        optimizer.step()
        g = gradient(step).double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        scale = rate * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        expected = expected * (1 - rate * decay) - scale * m / (v.sqrt() + eps)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("warmup", "total"), [(10, 36), (0, 5), (1, 2)])
def test_schedule_is_that_of_transformers(warmup, total):
    rates = []
    for make in (LinearWarmupDecay, get_linear_schedule_with_warmup):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = make(optimizer, warmup, total)
        rates.append([])
        for _ in range(total + 2):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == rates[1]
    assert rates[0][warmup] == 0.5 and rates[0][total] == 0
