"""Soft-DTW by its definition, cell by cell in float64: slow; the other back ends must equal it."""

import numpy as np
import torch
from torch import Tensor

from posinv.softdtw.band import Band

_PREDECESSORS = ((1, 1), (1, 0), (0, 1))  # in the order in which gamma = 0 breaks ties

Cell = tuple[int, int]


def _softmin(values: np.ndarray, gamma: float) -> np.floating:
    low = values.min()
    if gamma == 0 or np.isinf(low):
        return low
    return low - gamma * np.log(np.exp((low - values) / gamma).sum())


def _utterance(cost: dict[Cell, float], gamma: float) -> tuple[float, dict[Cell, float]]:
    """Value and expected alignment, given the cost of each cell on a path, row by row."""
    if not np.isfinite(list(cost.values())).all():
        return np.nan, dict.fromkeys(cost, np.nan)
    total: dict[Cell, float] = {(-1, -1): 0.0}  # of the paths to a cell
    weights = {}  # each cell's shares of its three predecessors
    for (i, j), c in cost.items():
        before = np.array([total.get((i - di, j - dj), np.inf) for di, dj in _PREDECESSORS])
        softmin = _softmin(before, gamma)
        total[i, j] = c + float(softmin)
        if gamma == 0:
            weights[i, j] = np.eye(3)[before.argmin()]
        else:
            weights[i, j] = np.exp((softmin - before) / gamma)
    last = next(reversed(cost))
    alignment = dict.fromkeys(cost, 0.0)
    alignment[last] = 1.0
    for i, j in reversed(cost):
        for (di, dj), weight in zip(_PREDECESSORS, weights[i, j], strict=True):
            if (i - di, j - dj) in alignment:
                alignment[i - di, j - dj] += alignment[i, j] * weight
    return float(total[last]), alignment


def align(
    cost: Tensor, band: Band, gamma: float, with_alignment: bool
) -> tuple[Tensor, Tensor | None]:
    """Back end of :mod:`posinv.softdtw.functional`."""
    values = np.zeros(len(cost))
    alignments = np.zeros(cost.shape)
    stored, inside = cost.double().cpu().numpy(), band.inside().cpu().numpy()
    columns = band.columns().cpu().numpy()
    for b in range(len(cost)):
        places = np.argwhere(inside[b]).tolist()
        cells = [(i, int(columns[b, i, k])) for i, k in places]
        costs = [stored[b, i, k] for i, k in places]
        values[b], alignment = _utterance(dict(zip(cells, costs, strict=True)), gamma)
        for (i, k), cell in zip(places, cells, strict=True):
            alignments[b, i, k] = alignment[cell]
    value = torch.from_numpy(values).to(cost)
    return value, torch.from_numpy(alignments).to(cost) if with_alignment else None
