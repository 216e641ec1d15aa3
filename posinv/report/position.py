"""Tables and pictures of how much position SSL models hold, and of the criteria through them."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from posinv.report.pictures import COLOURS, DASHES, Curve, convergence_figure
from posinv.report.results import ABSENT, ERROR_RATES, SHORT, markdown_table
from posinv.report.significance import Difference
from posinv.report.tables import Cell, Column, Table, figure


def position_tables(result: Mapping[str, Any]) -> str:
    """Return the Markdown tables of what ``position_probe`` wrote as JSON."""
    layers = result["layers"]
    silences = list(layers[0]["front"])
    last = silences[-1]
    header = [
        "layer",
        *(f"shift {name} s in front (%)" for name in silences),
        f"{last} s behind (%)",
        *("R² from start", "shifted", "follows", "R² from end", "shifted", "follows"),
        *("same index", "other index"),
    ]
    rows = []
    for layer in layers:
        probes = [
            f"{layer[side][key]:.2f}"
            for side in ("start", "end")
            for key in ("r2", "r2_shifted", "follows")
        ]
        rows.append(
            [
                str(layer["layer"]),
                *(f"{100 * layer['front'][name]:.1f}" for name in silences),
                f"{100 * layer['behind'][last]:.1f}",
                *probes,
                f"{layer['same_index']:.3f}",
                f"{layer['other_index']:.3f}",
            ]
        )
    text = (
        f"Position in the features of {result['ssl']}, {result['utterances']} utterances of "
        f"{result['data']}:\n\n{markdown_table(header, rows)}\n"
        "Shift: mean squared distance of a frame's features from those of the same frame with "
        "silence in front of or behind the speech, as a share of the mean squared distance of two "
        "frames of an utterance. R²: a linear probe of the frame's index on held-out utterances, "
        f"as it is and on speech shifted by {last} s; follows: by how much its prediction moves, "
        "over the shift (1: it reads position, 0: content). Index: cosine similarity of frames of "
        "different utterances at the same and at other indices, the mean frame subtracted.\n"
    )
    if "distances" in result:
        text += f"\n{_distance_table(result)}"
    return text


def _distance_table(result: Mapping[str, Any]) -> str:
    distances, surviving = result["distances"], result["surviving"]
    silences = [name for name in next(iter(distances.values())) if name != "0"]
    header = [
        "system",
        "MSE",
        *(f"reference shifted {name} s" for name in silences),
        *(f"drop that is left, {name} s (%)" for name in silences),
    ]
    rows = []
    for system, of in distances.items():
        left = surviving.get(system, dict.fromkeys(silences))
        shares = [ABSENT if left[name] is None else f"{100 * left[name]:.0f}" for name in silences]
        rows.append([system, *(f"{of[name]:.2f}" for name in ("0", *silences)), *shares])
    return (
        f"SSL features' MSE to the clean speech, layer {result['layer']}; drop from "
        f"{result['baseline']}:\n\n{markdown_table(header, rows)}"
    )


def position_figure(result: Mapping[str, Any]) -> Figure:
    """Draw the shift, the probes and the similarities over the layers."""
    layers = result["layers"]
    drawing = Figure(figsize=(10, 3), layout="constrained")
    panels = drawing.subplots(1, 3)
    silences = list(layers[0]["front"])
    shifts = {f"{name} s in front": [100 * of["front"][name] for of in layers] for name in silences}
    behind = [100 * of["behind"][silences[-1]] for of in layers]
    _draw(panels[0], "shift (% of distance)", shifts | {f"{silences[-1]} s behind": behind})
    probes = {}
    for side in ("start", "end"):
        probes[f"R², from {side}"] = [of[side]["r2"] for of in layers]
        probes[f"follows, from {side}"] = [of[side]["follows"] for of in layers]
    _draw(panels[1], "index probe", probes)
    similarities = {
        f"{name} index": [of[f"{name}_index"] for of in layers] for name in ("same", "other")
    }
    _draw(panels[2], "similarity across utterances", similarities)
    return drawing


def _draw(panel: Axes, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    for number, (name, values) in enumerate(curves.items()):
        panel.plot(
            range(len(values)),
            values,
            color=COLOURS[number],
            linestyle=DASHES[number],
            marker="o",
            markersize=3,
            label=name,
        )
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("layer")
    panel.axhline(0, color="grey", linewidth=0.5)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=8, frameon=False)


PROBES = ("r2", "follows")
Probes = Mapping[str, Mapping[str, Any]]  # position_probe's JSON, by SSL model
Found = Mapping[str, Sequence[Difference]]  # comparisons of systems, by SSL model
# MSE of SSL features on the validation set over updates of fine-tuning, for each random seed, by
# criterion, by SSL model
Convergence = Mapping[str, Mapping[str, Sequence[Curve]]]


def shift_of(probe: Mapping[str, Any]) -> float:
    """Return the shift of the layer that was compared, by the longest silence in front, in %."""
    front = probe["layers"][probe["layer"]]["front"]
    return 100 * front[list(front)[-1]]


def comparison_tables(probes: Probes, convergence: Convergence, found: Found) -> list[Table]:
    """Return tables of SSL models that hold more or less position.

    The first says how much, the second how the criteria converge, the others how the error rates
    of the criteria differ from those of ``ssl_mse``, in percentage points.

    Args:
        probes: what ``position_probe`` wrote; the enhanced speech in it is named
            ``<criterion>/<seed>``.
        convergence: curves of each SSL model.
        found: each SSL model's comparisons.
    """
    first = next(iter(probes.values()))
    last = list(first["layers"][0]["front"])[-1]
    named = [name.split("/") for name in first.get("surviving", {})]
    criteria = list(dict.fromkeys(parts[0] for parts in named if len(parts) == 2))
    rows = []
    for model, probe in probes.items():
        layer = probe["layers"][probe["layer"]]
        cells = [
            Cell(model),
            *(_percent(of) for of in layer["front"].values()),
            _percent(layer["behind"][last]),
        ]
        cells += [figure([layer[side][key]], 2) for side in ("start", "end") for key in PROBES]
        for criterion in criteria:
            left = [
                None if of[last] is None else 100 * of[last]
                for name, of in probe["surviving"].items()
                if name.split("/")[0] == criterion
            ]
            cells.append(figure(left, 0))
        rows.append(cells)
    columns = [
        "SSL model",
        *(f"shift {name} s in front (%)" for name in first["layers"][0]["front"]),
        f"{last} s behind (%)",
        *("R² from start", "follows", "R² from end", "follows"),
        *(f"drop left, {criterion} (%)" for criterion in criteria),
    ]
    caption = (
        f"Position in the layer that the criteria compare, and how much of the drop in the MSE of "
        f"features, from before fine-tuning, is left when the reference is shifted by {last} s"
    )
    position = Table("Position", caption, [Column(name) for name in columns], rows)
    differences = [_difference_table(task, found) for task in ERROR_RATES]
    return [position, convergence_table(convergence), *differences]


def _percent(share: float) -> Cell:
    return figure([100 * share])


def _difference_table(task: str, found: Found) -> Table:
    rows = []
    sets: dict[str, None] = {}
    for model, comparisons in found.items():
        of_systems: dict[str, dict[str, Cell]] = {}
        for one in comparisons:
            if (one.task, one.reference) == (task, "ssl_mse"):
                text = f"{one.value:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"
                marks = "*" if one.significant else ""
                of_systems.setdefault(one.system, {})[one.test_set] = Cell(text, one.value, marks)
                sets.setdefault(one.test_set)
        for system, cells in of_systems.items():
            rows.append([Cell(model), Cell(system), *(cells.get(name, Cell("")) for name in sets)])
    caption = (
        f"Difference in {SHORT[task]} from ssl_mse with the same SSL model, in percentage points, "
        "and its 95 % interval (*: the interval excludes 0; a difference below 0 is better than "
        "ssl_mse)"
    )
    columns = [Column(name) for name in ("SSL model", "criterion", *sets)]
    return Table(f"{SHORT[task]} against ssl_mse", caption, columns, rows)


def comparison_figure(probes: Probes, found: Found) -> Figure:
    """Draw the differences in PER from ``ssl_mse`` over the shift, a panel for each test set."""
    chosen = {
        model: [one for one in comparisons if (one.task, one.reference) == ("pr", "ssl_mse")]
        for model, comparisons in found.items()
    }
    sets = list(dict.fromkeys(one.test_set for of in chosen.values() for one in of))
    systems = list(dict.fromkeys(one.system for of in chosen.values() for one in of))
    size = max(1, len(sets))
    drawing = Figure(figsize=(2.6 * size, 3), layout="constrained")
    panels = drawing.subplots(1, size, sharey=True, squeeze=False)[0]
    for panel, test_set in zip(panels, sets, strict=False):
        for number, system in enumerate(systems):
            points = sorted(
                (shift_of(probes[model]), one.value, one.value - one.low, one.high - one.value)
                for model, of in chosen.items()
                for one in of
                if (one.test_set, one.system) == (test_set, system)
            )
            shift, value, below, above = zip(*points, strict=True)
            panel.errorbar(
                shift,
                value,
                (below, above),
                color=COLOURS[number],
                linestyle=DASHES[number],
                marker="o",
                markersize=3,
                capsize=2,
                label=system,
            )
        panel.axhline(0, color="grey", linewidth=0.5)
        panel.set_title(test_set, fontsize=9)
        panel.set_xlabel("shift (%)", fontsize=9)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlim(-0.3, 130)
        panel.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        panel.tick_params(labelsize=8)
    panels[0].set_ylabel("PER minus PER of ssl_mse", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    return drawing


def convergence_table(convergence: Convergence) -> Table:
    """Return the table of the MSE after each epoch of fine-tuning, with each SSL model."""
    rows = []
    updates: dict[int, None] = {}
    for model, of_criteria in convergence.items():
        for criterion, curves in of_criteria.items():
            after: dict[int, list[float]] = {}
            for x, y in curves:
                for update, value in zip(x, y, strict=True):
                    after.setdefault(round(update), []).append(value)
            updates.update(dict.fromkeys(sorted(after)))
            rows.append((model, criterion, {at: figure(of, 2) for at, of in after.items()}))
    caption = "MSE of SSL features on the validation set, by the number of updates of fine-tuning"
    columns = ["SSL model", "criterion", *(f"{at} updates" for at in updates)]
    cells = [
        [Cell(model), Cell(criterion), *(of.get(at, Cell(ABSENT)) for at in updates)]
        for model, criterion, of in rows
    ]
    return Table("Convergence", caption, [Column(name) for name in columns], cells)


def convergence_drawing(convergence: Convergence) -> Figure:
    """Draw the MSE over the updates of fine-tuning, one panel for each SSL model."""
    panels = {
        f"{model}: MSE": {"updates of fine-tuning": of_criteria}
        for model, of_criteria in convergence.items()
    }
    return convergence_figure(panels, [])
