"""Code that the benchmarks share: their options, and the output of their results."""

import argparse
import csv
import io
import math
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from posinv.augment.noise import pink
from posinv.data.audio import SAMPLING_RATE, write_audio
from posinv.data.files import write_atomic
from posinv.errors import InputError
from posinv.report.curves import save_figure
from posinv.report.results import ABSENT, markdown_table, provenance


def benchmark_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; ``quick`` is the help of --quick."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: cpu)")
    add("--out", type=Path, required=True, help="folder for the CSV and the plot")
    add("--quick", action="store_true", help=quick)
    return parser


def check_device(device: str) -> None:
    """Raise InputError if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU: use --device cpu")


def write_benchmark(
    path: Path, settings: str, columns: Sequence[str], records: Sequence[Sequence[str]]
) -> None:
    """Write the results as CSV, with comments that say how they were made, and print both.

    Args:
        path: the CSV file.
        settings: further comments, after command, machine and versions: a Markdown list.
        columns: names of the columns.
        records: the rows' cells.
    """
    origin = provenance(shlex.join(["python", *sys.argv])) + settings
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in origin.splitlines())
    csv.writer(text, lineterminator="\n").writerows([columns, *records])
    write_atomic(path, text.getvalue())
    print(origin)
    print(markdown_table(columns, records), end="")


class Clock:
    """Measures the time of each phase of an update; on a GPU by CUDA events, without waiting."""

    def __init__(self, device: torch.device, phases: Sequence[str]) -> None:
        self.on_gpu, self.phases = device.type == "cuda", phases
        self.updates: list[dict[str, list[tuple]]] = []

    def begin(self) -> None:
        """Begin a new update."""
        self.updates.append(defaultdict(list))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as this phase of the update, or as one of its parts."""
        on_gpu = self.on_gpu and name != "load"
        start = self._now(on_gpu)
        yield
        self.updates[-1][name].append((start, self._now(on_gpu)))

    def _now(self, on_gpu: bool) -> float | torch.cuda.Event:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> np.ndarray:
        """Return the seconds of each phase of each update, (updates, phases)."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return np.array([[self._sum(update[p]) for p in self.phases] for update in self.updates])

    def _sum(self, spans: list[tuple]) -> float:
        return sum(b - a if isinstance(a, float) else a.elapsed_time(b) / 1000 for a, b in spans)


@dataclass
class Row:
    """One implementation's figures."""

    name: str
    seconds: list[np.ndarray] = field(default_factory=list)  # (updates, phases) of each turn
    wall: list[float] = field(default_factory=list)  # seconds of one update, in each turn
    peak: float = math.nan  # bytes of GPU memory

    @property
    def update(self) -> float:
        """Seconds of one update, the median over turns."""
        return statistics.median(self.wall)

    def cells(self, posinv: "Row") -> list[str]:
        """Return updates, milliseconds of an update, times posinv's, phases, and MiB of memory."""
        return [
            str(sum(map(len, self.seconds))),
            *(f"{1e3 * t:.1f}" for t in (self.update, min(self.wall), max(self.wall))),
            f"{self.update / posinv.update:.2f}",
            *(f"{1e3 * t:.1f}" for t in np.median(np.concatenate(self.seconds), axis=0)),
            ABSENT if math.isnan(self.peak) else f"{self.peak / 2**20:.0f}",
        ]


def plot_phases(rows: Sequence[Row], phases: Sequence[str], title: str, out: Path) -> None:
    """Plot the time of each phase of an update."""
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for index, phase in enumerate(phases):
        widths = [np.median(np.concatenate(row.seconds), axis=0)[index] for row in rows]
        axes.barh([row.name for row in rows], widths, left=left, label=phase)
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel="median seconds of an update", title=title)
    figure.legend(ncols=len(phases), loc="outside lower center")
    save_figure(figure, out)


def write_flac(folder: Path, count: int, samples: int) -> list[Path]:
    """Write files of pink noise, louder and softer in turn, as speech with pauses is."""
    paths = [folder / f"{index}.flac" for index in range(count)]
    for index, path in enumerate(paths):
        write_audio(path, speech_like(index, samples), SAMPLING_RATE)
    return paths


def speech_like(seed: int, samples: int) -> np.ndarray:
    """Return pink noise (samples,), louder and softer in turn, as speech with pauses is."""
    rng = np.random.default_rng(seed)
    syllables = np.repeat(rng.uniform(0, 1, samples // 2400 + 1) ** 2, 2400)[:samples]
    x = pink(rng, samples, SAMPLING_RATE) * syllables
    return 0.5 * x / np.abs(x).max()
