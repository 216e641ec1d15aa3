"""Soft-DTW by its definition, cell by cell in float64: slow; the other back ends must equal it."""

import numpy as np
import torch
from torch import Tensor

_PREDECESSORS = ((1, 1), (1, 0), (0, 1))  # in the order in which gamma = 0 breaks ties


def _softmin(values: np.ndarray, gamma: float) -> np.floating:
    low = values.min()
    if gamma == 0 or np.isinf(low):
        return low
    return low - gamma * np.log(np.exp((low - values) / gamma).sum())


def _utterance(cost: np.ndarray, gamma: float, bandwidth: int | None) -> tuple[float, np.ndarray]:
    """Value and expected alignment of one (n, m) cost matrix."""
    n, m = cost.shape
    lag = np.subtract.outer(np.arange(n), np.arange(m))
    inside = abs(lag) <= (max(n, m) if bandwidth is None else bandwidth)
    if not np.isfinite(cost[inside]).all():
        return np.nan, np.where(inside, np.nan, 0.0)
    total = np.full((n + 1, m + 1), np.inf)  # total[i + 1, j + 1]: of the paths to cell (i, j)
    total[0, 0] = 0.0
    weights = np.zeros((n, m, 3))  # each cell's shares of its three predecessors
    for i, j in np.argwhere(inside):
        before = np.array([total[i + 1 - di, j + 1 - dj] for di, dj in _PREDECESSORS])
        softmin = _softmin(before, gamma)
        total[i + 1, j + 1] = cost[i, j] + softmin
        if gamma == 0:
            weights[i, j, before.argmin()] = 1.0
        else:
            weights[i, j] = np.exp((softmin - before) / gamma)
    alignment = np.zeros((n + 1, m + 1))  # alignment[i + 1, j + 1]: of cell (i, j)
    alignment[n, m] = 1.0
    for i, j in np.argwhere(inside)[::-1]:
        for k, (di, dj) in enumerate(_PREDECESSORS):
            alignment[i + 1 - di, j + 1 - dj] += alignment[i + 1, j + 1] * weights[i, j, k]
    return float(total[n, m]), alignment[1:, 1:]


def align(
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float,
    bandwidth: int | None,
    with_alignment: bool,
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`."""
    values = torch.zeros(len(cost), dtype=torch.float64)
    alignments = torch.zeros(cost.shape, dtype=torch.float64)
    lengths = zip(x_lengths.tolist(), y_lengths.tolist(), strict=True)
    for b, (n, m) in enumerate(lengths):
        value, alignment = _utterance(cost[b, :n, :m].double().cpu().numpy(), gamma, bandwidth)
        values[b] = value
        alignments[b, :n, :m] = torch.from_numpy(alignment)
    return values.to(cost), alignments.to(cost) if with_alignment else None
