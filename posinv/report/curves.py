"""The statistics that ESPnet records in each epoch of a training, and plots of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from posinv.data.checkpoint import read_checkpoint
from posinv.data.files import atomic_file


def read_epochs(training: Path | str) -> list[dict[str, dict[str, float]]]:
    """Read the statistics of an ESPnet training.

    Args:
        training: the training's output directory, with ``checkpoint.pth``.

    Returns:
        For each epoch, from the first on, the statistics in ``train`` and ``valid``: those of the
        model, and ``time`` in seconds.

    Raises:
        InputError: there is no such checkpoint.
    """
    path = Path(training) / "checkpoint.pth"
    # Memory-mapped, so that the weights in the same file are not read.
    state = cast(dict[str, Any], read_checkpoint(path, mmap=True))
    return [
        {phase: _numbers(epoch[phase]) for phase in ("train", "valid")}
        for _, epoch in sorted(state["reporter"]["stats"].items())
    ]


def _numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    # ESPnet saves a time as {"__timedelta_seconds__": 1.5}.
    return {
        name: float(value["__timedelta_seconds__"] if isinstance(value, dict) else value)
        for name, value in stats.items()
    }


def plot_curves(
    trainings: Mapping[str, Sequence[Path]],
    quantities: Mapping[str, str],
    out: Path | str,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Plot statistics of the validation set over the epochs, each in a panel of its own.

    Args:
        trainings: the output directories of each system's trainings, one for each random seed.
        quantities: the panel's title for each statistic; trainings without it have no line.
        out: image file, written atomically.
        levels: statistics before training; each is drawn as a dashed line.

    Raises:
        InputError: a training without checkpoint.
    """
    out = Path(out)
    levels = levels or {}
    figure = Figure(figsize=(4 * len(quantities), 3.4), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    colours = matplotlib.color_sequences["tab10"]
    for colour, (system, directories) in zip(colours, trainings.items(), strict=False):
        for number, directory in enumerate(directories):
            epochs = read_epochs(directory)
            for panel, name in zip(panels, quantities, strict=True):
                values = [epoch["valid"].get(name, np.nan) for epoch in epochs]
                panel.plot(
                    range(1, len(values) + 1),
                    values,
                    color=colour,
                    label=None if number else system,
                )
    for panel, (name, title) in zip(panels, quantities.items(), strict=True):
        if name in levels:
            panel.axhline(levels[name], color="black", linestyle="--", label="before")
        low, high = panel.dataLim.intervaly
        if low > 0 and high > 100 * low:
            panel.set_yscale("log")
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
    panels[-1].legend()
    save_figure(figure, out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write an image of the kind its suffix names, atomically; its folder is made."""
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=120)
