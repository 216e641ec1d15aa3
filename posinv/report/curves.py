"""What ESPnet recorded of a training, epoch by epoch, and its curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from posinv.data.checkpoint import read_checkpoint
from posinv.data.files import atomic_file


def read_epochs(training: Path | str) -> list[dict[str, dict[str, float]]]:
    """Read what an ESPnet training recorded.

    Args:
        training: its output directory, with ``checkpoint.pth``.

    Returns:
        For each epoch from the first, the statistics of ``train`` and ``valid``: those of the
        model, and ``time`` in seconds.

    Raises:
        InputError: there is no such checkpoint.
    """
    path = Path(training) / "checkpoint.pth"
    # Mapped, since the weights beside the records are not wanted.
    state = read_checkpoint(path, mmap=True)
    return [
        {phase: _numbers(epoch[phase]) for phase in ("train", "valid")}
        for _, epoch in sorted(state["reporter"]["stats"].items())
    ]


def _numbers(stats: Mapping[str, object]) -> dict[str, float]:
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
    """Plot quantities of the validation set against the epoch, one panel each.

    Args:
        trainings: the output directories, one for each seed, by system.
        quantities: titles of the panels, by statistic; a training without it has no line.
        out: image file, written atomically.
        levels: a statistic's value before training, a dashed line.

    Raises:
        InputError: a training without checkpoint.
    """
    out = Path(out)
    figure = Figure(figsize=(4 * len(quantities), 3.4), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    colours = matplotlib.colormaps["tab10"].colors
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
        if name in (levels or {}):
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
