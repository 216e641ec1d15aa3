"""Pictures for the report and for TensorBoard: spectrograms, alignments, convergence."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional

from posinv.data.audio import SAMPLING_RATE
from posinv.softdtw import soft_alignment

# Lines that can be told apart on light and dark ground, by the colour-blind and in print.
COLOURS = ("#3f7fbf", "#d0792b", "#2e9e7f", "#b8578f", "#7d6fc9", "#8b8f55", "#a3564c", "#5f8fa8")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
PATH = (127, 227, 255)  # on a dark ground
INK = "#010203"  # stands for the colour of the text around a drawing
FFT, HOP, RANGE = 512, 160, 70  # of spectrograms: samples, samples, dB


@dataclass(frozen=True)
class Alignment:
    """Two feature sequences, aligned.

    Attributes:
        distance: (N, M) squared Euclidean distances of the L2-normalised frames, in [0, 4].
        expected: (N, M) the expected alignment of soft-DTW, in [0, 1].
        path: (P, 2) the cells of the path of DTW, from the first to the last.
    """

    distance: np.ndarray
    expected: np.ndarray
    path: np.ndarray


def align_features(x: Tensor, y: Tensor, gamma: float) -> Alignment:
    """Align two feature sequences (N, D) and (M, D) by soft-DTW, and by DTW."""
    x, y = (functional.normalize(z.detach().double().cpu(), dim=1) for z in (x, y))
    distance = (2 - 2 * x @ y.T).clamp(min=0)
    # In float32, for which set-up has compiled soft-DTW: for float64 it would take up to a minute.
    cost = distance.float()
    expected, hard = (soft_alignment(cost, gamma=value) for value in (gamma, 0.0))
    path = torch.nonzero(hard > 0.5)
    return Alignment(distance.numpy(), expected.numpy(), path.numpy())


def alignment_figure(
    alignment: Alignment, seconds: float, rows: str, columns: str, ink: str = "black"
) -> Figure:
    """Draw the distances and the expected alignment, each with the path of DTW.

    Args:
        alignment: the alignment.
        seconds: from one frame to the next.
        rows: what the rows are, for the vertical axis.
        columns: what the columns are.
        ink: colour of axes and text.
    """
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    height, width = (seconds * size for size in alignment.distance.shape)
    panels = figure.subplots(1, 2, sharey=True)
    # The second line is thin, so as not to cover the alignment.
    heats = (("distance", alignment.distance, 1.2), ("soft alignment", alignment.expected, 0.4))
    path = (alignment.path + 0.5) * seconds
    for panel, (title, values, thickness) in zip(panels, heats, strict=True):
        extent = (0, width, 0, height)
        panel.imshow(values, origin="lower", aspect="auto", extent=extent, cmap="magma")
        colour = np.array(PATH) / 255
        panel.plot(path[:, 1], path[:, 0], color=colour, linewidth=thickness, label="DTW")
        panel.set_title(title, fontsize=10, color=ink)
        panel.set_xlabel(f"{columns} (s)")
        _ink(panel, ink)
    panels[0].set_ylabel(f"{rows} (s)")
    legend = panels[0].legend(loc="lower right", fontsize=8, frameon=True)
    legend.get_frame().set(facecolor="black", alpha=0.6, linewidth=0)
    legend.get_texts()[0].set_color("white")
    return figure


def alignment_image(alignment: Alignment) -> np.ndarray:
    """Return the distances and the expected alignment, side by side, as an image (H, W, 3).

    The path of DTW is drawn over the distances, and the first frames are at the lower left. It
    takes less time than :func:`alignment_figure`.
    """
    heats = [coloured(_bytes(values)) for values in (alignment.distance / 4, alignment.expected)]
    heats[0][tuple(alignment.path.T)] = PATH
    heats = [heat[::-1] for heat in heats]
    gap = np.full((len(heats[0]), 4, 3), 255, np.uint8)
    image = np.concatenate([heats[0], gap, heats[1]], axis=1)
    enlarged = max(1, 300 // len(image))
    return image.repeat(enlarged, axis=0).repeat(enlarged, axis=1)


def coloured(image: np.ndarray, colours: str = "magma") -> np.ndarray:
    """Return an image (H, W) of uint8 in colours, (H, W, 3) of uint8."""
    return _palette(colours)[image]


def _palette(colours: str) -> np.ndarray:
    """Return the 256 colours of a colour map, (256, 3) of uint8."""
    return _bytes(np.asarray(matplotlib.colormaps[colours](np.arange(256)))[:, :3])


def _bytes(values: np.ndarray) -> np.ndarray:
    return (255 * np.clip(values, 0, 1)).astype(np.uint8)


def spectrogram(wave: np.ndarray, level: float | None = None) -> np.ndarray:
    """Return a spectrogram as an image (F, T) of uint8, the lowest frequency in the last row.

    Args:
        wave: (T,) at 16 kHz.
        level: the power in dB that is brightest; None: the largest of this wave. What is 70 dB
            below is black.
    """
    power = spectrum(wave)
    top = float(power.max()) if level is None else level
    return _bytes((power[::-1] - top) / RANGE + 1)


def spectrum(wave: np.ndarray) -> np.ndarray:
    """Return the power of a 16 kHz wave (T,) in dB, (F, T'), a frame every 10 ms."""
    samples = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    window = torch.hann_window(FFT)
    short = torch.stft(samples, FFT, HOP, window=window, pad_mode="constant", return_complex=True)
    return (10 * torch.log10(short.abs().square() + 1e-10)).numpy()


def png(image: np.ndarray, colours: str = "magma") -> bytes:
    """Return an image (H, W) of uint8 as PNG with 256 colours."""
    picture = Image.fromarray(image)
    picture.putpalette(_palette(colours).tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


Curve = tuple[Sequence[float], Sequence[float]]


def convergence_figure(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[Curve]]]], logarithmic: Sequence[str]
) -> Figure:
    """Draw curves on common axes, a row of panels for each quantity.

    Args:
        panels: the curves of each random seed, by quantity, by the horizontal axis' name, and by
            system.
        logarithmic: the quantities with a logarithmic axis.
    """
    axes = list(dict.fromkeys(name for of in panels.values() for name in of))
    figure = Figure(figsize=(9.2, 2.1 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), len(axes), squeeze=False, sharex="col", sharey="row")
    systems = list(dict.fromkeys(s for of in panels.values() for c in of.values() for s in c))
    for row, (quantity, of_axes) in zip(grid, panels.items(), strict=True):
        for panel, name in zip(row, axes, strict=True):
            for system, curves in of_axes.get(name, {}).items():
                number = systems.index(system)
                for k, (x, y) in enumerate(curves):
                    panel.plot(
                        x,
                        y,
                        color=COLOURS[number % len(COLOURS)],
                        linestyle=DASHES[number % len(DASHES)],
                        marker="o",
                        markersize=3,
                        linewidth=1.6,
                        label=system if k == 0 else None,
                    )
            if quantity in logarithmic:
                panel.set_yscale("log")
            panel.grid(alpha=0.25, color=INK)
            panel.spines[["top", "right"]].set_visible(False)
            _ink(panel, INK)
        row[0].set_ylabel(quantity, fontsize=9)
    for panel, name in zip(grid[-1], axes, strict=True):
        panel.set_xlabel(name)
    handles: dict[str, Artist] = {}
    for panel in grid.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=min(len(handles), 6) or 1,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=3,
    )
    return figure


def _ink(panel: Axes, ink: str) -> None:
    panel.tick_params(colors=ink, labelsize=8)
    panel.xaxis.label.set(color=ink, fontsize=9)
    panel.yaxis.label.set(color=ink, fontsize=9)
    for spine in panel.spines.values():
        spine.set_color(ink)


def svg(figure: Figure, name: str) -> str:
    """Return a drawing as an SVG element for a web page.

    Its text stays text, and what has the colour :data:`INK` takes the colour of the page's text.

    Args:
        figure: the drawing.
        name: makes the ids in it its own: another name for each drawing of a page.
    """
    out = io.StringIO()
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The element's size is its page's business; its ids must differ from other drawings'.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def frame_seconds(hop: int) -> float:
    """Return the seconds from one SSL frame to the next."""
    return hop / SAMPLING_RATE
