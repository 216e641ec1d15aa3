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
    total = {(-1, -1): 0.0}  # of the paths to a cell
    weights = {}  # each cell's shares of its three predecessors
    for (i, j), c in cost.items():
        before = np.array([total.get((i - di, j - dj), np.inf) for di, dj in _PREDECESSORS])
        softmin = _softmin(before, gamma)
        total[i, j] = c + softmin
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
    values = torch.zeros(len(cost), dtype=torch.float64)
    alignments = torch.zeros(cost.shape, dtype=torch.float64)
    stored, inside = cost.double().cpu().numpy(), band.inside()
    columns = band.columns()
    for b in range(len(cost)):
        places = {(i, int(columns[b, i, k])): (i, k) for i, k in inside[b].nonzero().tolist()}
        value, alignment = _utterance({c: stored[b][p] for c, p in places.items()}, gamma)
        values[b] = value
        for cell, visits in alignment.items():
            alignments[(b, *places[cell])] = visits
    return values.to(cost), alignments.to(cost) if with_alignment else None
