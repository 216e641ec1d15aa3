r"""Which cells of a cost matrix are inside a band, and how only those are stored.

Of n by m frames, cell (i, j) is inside if ``2 |i q - j p| <= reach``. The three integers are the
pair's *line*; it runs through (0, 0) in the direction of p rows and q columns.

=========  ======  ======  ==============================
band       p       q       reach
=========  ======  ======  ==============================
fixed      1       1       2 bandwidth
slanted    n - 1   m - 1   (2 bandwidth + 1) max(p, q)
=========  ======  ======  ==============================

The slanted line ends in the last cell. For each frame of the longer sequence, the band has the
frames of the shorter one that are at most bandwidth + 1/2 from the line: at least the nearest one.
So it always holds a path, it is the same if the two sequences change places, and for n = m both
bands are ``|i - j| <= bandwidth``.

Costs and alignments of a band are (B, N, W), W <= M. Rows are stored in blocks of 64. Each row of a
block begins with the same column, the first that is inside the band in the row above the block::

    . cells outside the band, # cells inside, | | what is stored of blocks of three rows, W = 6

     0 |# # . . . .|. . .
     1 |# # # . . .|. . .
     2 |. # # # . .|. . .
     3  .|. # # # . .|. .
     4  .|. . # # # .|. .
     5  .|. . . # # #|. .
     6  . . .|. . # # # .|
     7  . . .|. . . # # #|
     8  . . .|. . . . # #|
"""

from typing import NamedTuple

import torch
from torch import Tensor

from posinv.errors import InputError

KINDS = ("slanted", "fixed")
ROWS = 64  # of a block; kernel.cu and cpu.py divide it into smaller ones


class Band(NamedTuple):
    """The cells of each pair of a batch that are inside its lengths and band.

    All tensors are int64 and on the device of the lengths.
    """

    x_lengths: Tensor  # (B,)
    y_lengths: Tensor  # (B,)
    lines: Tensor  # (B, 3): p, q, reach
    first: Tensor  # (B, blocks): the first column that is stored of each block of rows
    N: int
    M: int
    width: int  # W: the number of columns that are stored

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four tensors, each with B rows."""
        return self.x_lengths, self.y_lengths, self.lines, self.first

    def columns(self, device: torch.device | None = None) -> Tensor:
        """Return the column of each stored cell, (B, N, W), on a device, or that of the lengths."""
        first = self.first if device is None else self.first.to(device, non_blocking=True)
        rows = first.repeat_interleave(ROWS, dim=1)[:, : self.N]
        return rows[:, :, None] + torch.arange(self.width, device=first.device)

    def inside(self) -> Tensor:
        """Return whether each stored cell is inside the lengths and the band, (B, N, W)."""
        j = self.columns()
        i = torch.arange(self.N, device=j.device)[:, None]
        p, q, reach = self.lines.T[:, :, None, None]
        n, m = self.x_lengths[:, None, None], self.y_lengths[:, None, None]
        return (i < n) & (j < m) & (2 * (i * q - j * p).abs() <= reach)


def make_band(
    x_lengths: Tensor,
    y_lengths: Tensor,
    N: int,
    M: int,
    bandwidth: int | None,
    kind: str,
    known: bool,
) -> Band:
    """Return the band of each pair of checked lengths.

    Args:
        x_lengths: (B,).
        y_lengths: (B,), on the same device.
        N: rows of the costs.
        M: columns of the costs.
        bandwidth: in frames, or None for no band.
        kind: one of KINDS.
        known: whether the lengths can be read here. Otherwise a slanted band, whose width depends
            on them, is stored with all M columns.
    """
    lines = x_lengths.new_ones(len(x_lengths), 3)
    lines[:, 2] = everything = 2 * max(N, M)
    width = M
    if bandwidth is not None:
        bandwidth = min(bandwidth, max(N, M))
        if kind == "fixed":
            lines[:, 2] = 2 * bandwidth
            width = min(M, ROWS + 2 * bandwidth + 1)
        else:
            p, q = x_lengths - 1, y_lengths - 1
            reach = (2 * bandwidth + 1) * torch.maximum(p, q)
            row = p < 1  # a single row has all columns
            lines = torch.stack(
                [
                    p.masked_fill(row, 1),
                    q.masked_fill(row, 1),
                    reach.masked_fill(row, everything),
                ],
                dim=1,
            )
            if known and len(lines):
                p, q, reach = lines.T
                width = int(torch.minimum((ROWS * q + reach) // p + 1, y_lengths).max())
    if width == M:
        first = x_lengths.new_zeros(len(x_lengths), -(-N // ROWS))
    else:
        p, q, reach = lines.T[:, :, None]
        above = torch.arange(0, N, ROWS, device=lines.device) - 1
        first = -torch.div(reach - 2 * above * q, 2 * p, rounding_mode="floor")
        first = first.clamp(0, M - width)
    return Band(x_lengths, y_lengths, lines, first, N, M, width)


def check_kind(name: str, kind: str) -> None:
    """Raise InputError unless kind is known."""
    if kind not in KINDS:
        raise InputError(f"{name}: band must be one of {', '.join(KINDS)}, got {kind!r}")
