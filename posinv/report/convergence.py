"""How trainings converge: statistics of the validation set over updates and over minutes."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from posinv.errors import InputError
from posinv.report.curves import read_epochs
from posinv.report.experiment import Experiment
from posinv.report.pictures import Curve

Curves = dict[str, dict[str, list[Curve]]]  # by horizontal axis, by system, for each random seed

HEADS = "validation\nerror rate (%)"
RELATIVE = "validation loss\n(first epoch = 1)"
STATISTICS = {
    "ssl_mse": "SSL features' MSE",
    "alignment": "alignment loss",
    "regulariser": "regulariser",
    "ssl_frame_distance": "frame distance",
    "ssl_effective_rank": "effective rank",
}
LOGARITHMIC = ("regulariser",)


@cache
def config_of(training: Path) -> dict[str, Any]:
    """Return the ``config.yaml`` of a training; empty if there is none."""
    path = training / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def epochs_of(training: Path) -> list[dict[str, dict[str, float]]]:
    """Return what :func:`~.curves.read_epochs` does; where it can't, warn and return nothing."""
    try:
        return read_epochs(training)
    except InputError as error:
        logging.warning("no curve: %s", error)
        return []


def fine_tuning_panels(experiment: Experiment) -> dict[str, Curves]:
    """Return the curves of fine-tuning by what they show; empty without any.

    The first are the validation losses, each over its own first value, since the losses of
    different criteria have different units. Then come the statistics that the systems share.
    """
    panels = {RELATIVE: fine_tuning_curves(experiment, "loss", relative=True)}
    for name, title in STATISTICS.items():
        curves = fine_tuning_curves(experiment, name)
        # One criterion's own loss is in the first panel.
        if len(curves["updates"]) > 1 or (name != "ssl_mse" and curves["updates"]):
            panels[title] = curves
    return panels if panels[RELATIVE]["updates"] else {}


def fine_tuning_curves(experiment: Experiment, name: str, relative: bool = False) -> Curves:
    """Return a statistic of the validation set, of each fine-tuning that measured it.

    If ``relative``, each curve is compared with its own first value, see :func:`_curves`.
    """
    trainings = {
        experiment.labels[system]: [
            training
            for seed in experiment.seeds
            if (training := experiment.training(seed, system)) is not None
        ]
        for system in experiment.systems
        if system not in ("noisy", "enh", "base")
    }
    return _curves(trainings, name, relative)


def head_panels(experiment: Experiment, task: str) -> dict[str, Curves]:
    """Return the token error rate of each head of ``pr`` or ``asr`` by epoch; no head: empty."""
    heads = {
        experiment.labels[system]: [
            head
            for seed in experiment.seeds
            if (head := experiment.head(seed, system, task)).is_dir()
        ]
        for system in experiment.systems
    }
    curves = _curves(heads, "cer_ctc", factor=100)
    return {HEADS: curves} if curves["updates"] else {}


def _curves(
    trainings: Mapping[str, Sequence[Path]], name: str, relative: bool = False, factor: float = 1
) -> Curves:
    """Return a validation statistic of each training over updates and over minutes.

    If ``relative``, a value v becomes 1 + (v - first) / |first|, since losses may be negative.
    """
    curves: Curves = {"updates": {}, "minutes": {}}
    for system, directories in trainings.items():
        for directory in directories:
            epochs = [epoch for epoch in epochs_of(directory) if name in epoch["valid"]]
            values = [factor * epoch["valid"][name] for epoch in epochs]
            if not values or not all(map(math.isfinite, values)):
                continue
            if relative:
                first = values[0]
                values = [1 + (value - first) / (abs(first) or 1.0) for value in values]
            config = config_of(directory)
            accumulated = config.get("accum_grad") or 1
            updates = [epoch["train"]["total_count"] / accumulated for epoch in epochs]
            seconds = accumulate(
                epoch["train"]["time"] + epoch["valid"]["time"] for epoch in epochs
            )
            minutes = [value / 60 for value in seconds]
            for axis, x in (("updates", updates), ("minutes", minutes)):
                curves[axis].setdefault(system, []).append((x, values))
    return curves
