"""Soft-DTW in plain torch operations, on any device: one step per anti-diagonal of the batch.

Accumulated costs and weights are always float64, as the rounding error of float32 would change the
weights (see :mod:`posinv.softdtw.cpu`).
"""

import torch
from torch import Tensor

from posinv.softdtw.band import ROWS, Band

_UNREACHABLE = 1e300  # the accumulated cost outside the band; finite, as inf - inf is not a number


def align(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`."""
    value, alignment, _ = _run(cost, band, gamma, with_alignment, None)
    return value, alignment


def alignment_change(cost: Tensor, band: Band, gamma: float, change: Tensor) -> Tensor:
    r"""How the alignment changes with the cost: its derivative in the direction ``change``.

    This is the Hessian of soft-DTW times a vector. The recursions of value and alignment are
    differentiated step by step (Mensch & Blondel, *Differentiable Dynamic Programming for
    Structured Prediction and Attention*, ICML 2018, algorithm 2). For gamma = 0 it is zero.

    Args:
        cost: (B, N, W), finite inside the band.
        band: which cells these are.
        gamma: smoothing.
        change: (B, N, W).

    Returns:
        (B, N, W), zero outside the band.
    """
    if gamma == 0:
        return torch.zeros_like(cost)
    found = _run(cost, band, gamma, True, change)[2]
    assert found is not None
    return found


def _run(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool, change: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value, alignment, and the alignment's derivative in the direction change."""
    device = cost.device
    B, N, W = cost.shape
    if B == 0:
        return cost.new_zeros(B), torch.zeros_like(cost), torch.zeros_like(cost)
    inside = band.inside().to(device)
    not_finite = (inside & ~cost.isfinite()).flatten(1).any(1)
    cells = _Diagonals(band, device)

    def flat(x: Tensor, outside: float) -> Tensor:
        x = x.double().masked_fill(not_finite[:, None, None], 0.0).masked_fill(~inside, outside)
        # One place more, for all cells that are not stored.
        return torch.cat([x.flatten(1), x.new_full((B, 1), outside)], dim=1)

    # Outside cells cost so much that no path goes there; N + M of them do not overflow.
    costs = flat(cost, _UNREACHABLE)
    changes = None if change is None else flat(change, 0.0)
    ends = band.x_lengths + band.y_lengths - 2
    last_diagonals, ends, n = set(ends.tolist()), ends.to(device), band.x_lengths.to(device)
    value = costs.new_zeros(B)
    # Column i + 1 holds row i. The diagonal predecessor of (0, 0), on diagonal -2, is 0.
    unreachable = costs.new_full((B, N + 1), _UNREACHABLE)
    before, last = unreachable.clone(), unreachable
    before[:, 0] = 0.0
    still = costs.new_zeros(B, N + 1)
    before_change, last_change = still, still
    weights = []
    for d in range(len(cells)):
        first, stop, places = cells[d]
        here, above = slice(first + 1, stop + 1), slice(first, stop)
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
            share = torch.stack([diagonal, up, ~(diagonal | up)]).to(costs)
        total = unreachable.clone()
        total[:, here] = costs.gather(1, places) + softmin
        before, last = last, total
        share_change = None
        if changes is not None:
            of = torch.stack([before_change[:, above], last_change[:, above], last_change[:, here]])
            mean = (share * of).sum(dim=0)
            share_change = share * (mean - of) / gamma
            total_change = still.clone()
            total_change[:, here] = changes.gather(1, places) + mean
            before_change, last_change = last_change, total_change
        if with_alignment:
            weights.append((share, share_change))
        if d in last_diagonals:
            value = torch.where(ends == d, total.gather(1, n[:, None]).squeeze(1), value)
    value = value.masked_fill(not_finite, torch.nan).to(cost.dtype)
    if not with_alignment:
        return value, None, None

    def spread(arriving: list[Tensor], moved: Tensor, d: int) -> list[Tensor]:
        """Add what diagonal d passes on; return the arrays for d - 1, d - 2 and d - 3."""
        first, stop, _ = cells[d]
        here, above = slice(first + 1, stop + 1), slice(first, stop)
        diagonal, up, left = moved
        arriving[1][:, above] += up
        arriving[1][:, here] += left
        arriving[2][:, above] += diagonal
        return [*arriving[1:], torch.zeros_like(still)]

    out, out_change = torch.zeros_like(costs), torch.zeros_like(costs)
    arriving = [torch.zeros_like(still) for _ in range(3)]  # for diagonals d, d - 1, d - 2
    arriving_change = [torch.zeros_like(still) for _ in range(3)]
    for d in reversed(range(len(cells))):
        first, stop, places = cells[d]
        here = slice(first + 1, stop + 1)
        if d in last_diagonals:
            arriving[0].scatter_add_(1, n[:, None], (ends == d)[:, None].to(costs))
        passing = arriving[0][:, here]
        out.scatter_(1, places, passing)
        share, share_change = weights.pop()
        arriving = spread(arriving, passing * share, d)
        if share_change is not None:
            passing_change = arriving_change[0][:, here]
            out_change.scatter_(1, places, passing_change)
            moved = passing * share_change + passing_change * share
            arriving_change = spread(arriving_change, moved, d)

    def of_cost(x: Tensor) -> Tensor:
        x = x[:, :-1].view(B, N, W).masked_fill(not_finite[:, None, None], torch.nan)
        return x.masked_fill(~inside, 0.0).to(cost.dtype)

    return value, of_cost(out), None if changes is None else of_cost(out_change)


class _Diagonals:
    """Where the cells of each anti-diagonal of a batch are stored.

    Item d is the first row and one past the last row that any pair has on diagonal d, and (B, rows)
    indices into the flattened (N W) cells; N W for a cell that is not stored.
    """

    def __init__(self, band: Band, device: torch.device) -> None:
        self.band, self.device = band, device
        self.shift = band.first.to(device).repeat_interleave(ROWS, dim=1)[:, : band.N]
        d = torch.arange(len(self))[:, None]
        p, q, reach = band.lines.cpu().T
        low = -torch.div(reach - 2 * d * p, 2 * (p + q), rounding_mode="floor")
        high = torch.div(2 * d * p + reach, 2 * (p + q), rounding_mode="floor")
        self.first = torch.maximum(low.amin(1), d[:, 0] - band.M + 1).clamp(min=0).tolist()
        stop = torch.minimum(high.amax(1), d[:, 0]).clamp(max=band.N - 1) + 1
        self.stop = torch.maximum(stop, torch.tensor(self.first)).tolist()

    def __len__(self) -> int:
        return max(self.band.N + self.band.M - 1, 0)

    def __getitem__(self, d: int) -> tuple[int, int, Tensor]:
        first, stop = self.first[d], self.stop[d]
        rows = torch.arange(first, stop, device=self.device)
        column = d - rows - self.shift[:, first:stop]
        stored = (column >= 0) & (column < self.band.width)
        places = rows * self.band.width + column
        return first, stop, places.masked_fill(~stored, self.band.N * self.band.width)
