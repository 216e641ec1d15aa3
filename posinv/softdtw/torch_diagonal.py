"""Soft-DTW in plain torch operations, on any device: one step per anti-diagonal of the batch.

Accumulated costs and weights are always float64, as the rounding error of float32 would change the
weights (see :mod:`posinv.softdtw.cpu`).
"""

import torch
from torch import Tensor

_UNREACHABLE = 1e300  # the accumulated cost outside the band; finite, as inf - inf is not a number


def align(
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float,
    bandwidth: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`."""
    B, N, M = cost.shape
    n, m = x_lengths.to(cost.device), y_lengths.to(cost.device)
    i = torch.arange(N, device=cost.device)[:, None]
    j = torch.arange(M, device=cost.device)
    inside = (i < n[:, None, None]) & (j < m[:, None, None])  # B, N, M
    if bandwidth is not None:
        inside &= (i - j).abs() <= bandwidth
    not_finite = (inside & ~cost.isfinite()).flatten(1).any(1)
    # Outside cells cost so much that no path goes there; N + M of them do not overflow.
    flat = cost.double().masked_fill(not_finite[:, None, None], 0.0)
    flat = flat.masked_fill(~inside, _UNREACHABLE).flatten(1)

    def rows(d: int) -> tuple[int, int, slice]:
        """First row and one past the last row of anti-diagonal d, and its cells in flat."""
        first, stop = max(0, d - M + 1), min(N - 1, d) + 1
        step = max(M - 1, 1)
        return first, stop, slice(first * (M - 1) + d, (stop - 1) * (M - 1) + d + 1, step)

    last_diagonals = set((x_lengths + y_lengths - 2).tolist())
    value = flat.new_zeros(B)
    # Column i + 1 holds row i. The diagonal predecessor of (0, 0), on diagonal -2, is 0.
    unreachable = flat.new_full((B, N + 1), _UNREACHABLE)
    before, last = unreachable.clone(), unreachable
    before[:, 0] = 0.0
    weights = []
    for d in range(N + M - 1):
        first, stop, cells = rows(d)
        here = slice(first + 1, stop + 1)
        above = slice(first, stop)
        predecessors = torch.stack([before[:, above], last[:, above], last[:, here]])
        low = predecessors.amin(dim=0)
        if gamma > 0:
            share = torch.exp((low - predecessors) / gamma)
            share_sum = share.sum(dim=0)
            softmin = low - gamma * torch.log(share_sum)
            share /= share_sum
        else:
            softmin = low
            diagonal, up, _ = predecessors == low
            up = up & ~diagonal
            share = torch.stack([diagonal, up, ~(diagonal | up)]).to(flat)
        total = unreachable.clone()
        total[:, here] = flat[:, cells] + softmin
        before, last = last, total
        if with_alignment:
            weights.append(share)
        if d in last_diagonals:
            value = torch.where(n + m - 2 == d, total.gather(1, n[:, None]).squeeze(1), value)
    value = value.masked_fill(not_finite, torch.nan).to(cost.dtype)
    if not with_alignment:
        return value, None

    out = torch.zeros_like(flat)
    arriving = [flat.new_zeros(B, N + 1) for _ in range(3)]  # for diagonals d, d - 1, d - 2
    for d in reversed(range(N + M - 1)):
        first, stop, cells = rows(d)
        here = slice(first + 1, stop + 1)
        above = slice(first, stop)
        if d in last_diagonals:
            arriving[0].scatter_add_(1, n[:, None], (n + m - 2 == d)[:, None].to(flat))
        passing = arriving[0][:, here]
        out[:, cells] = passing
        diagonal, up, left = passing * weights.pop()
        arriving[1][:, above] += up
        arriving[1][:, here] += left
        arriving[2][:, above] += diagonal
        arriving = [*arriving[1:], flat.new_zeros(B, N + 1)]
    out = out.view(B, N, M).masked_fill(not_finite[:, None, None] & inside, torch.nan)
    return value, out.to(cost.dtype)
