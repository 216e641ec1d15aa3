"""The tables of a recipe that fine-tunes SSL models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from posinv.errors import InputError
from posinv.report.curves import read_epochs
from posinv.report.results import (
    ERROR_RATES,
    NONE_PUBLISHED,
    SHORT,
    Published,
    aggregate,
    error_rate_cells,
    markdown_table,
    search_table,
    seeds_caption,
)

COLLAPSE = {"frame_distance": ("frame distance", 3), "effective_rank": ("effective rank", 1)}


def ssft_report(
    expdir: Path | str,
    systems: Sequence[str],
    sets: Sequence[str],
    seeds: Sequence[str],
    published: Published = NONE_PUBLISHED,
    qbe_sets: Sequence[str] = (),
) -> str:
    """Return the tables of SSL models before and after fine-tuning: PER, WER and collapse.

    Args:
        expdir: folder with ``seed<seed>/<system>/superb/{pr,asr}/best``, the best head of a
            learning-rate sweep, and ``seed<seed>/<system>/collapse.json``. If the system was
            fine-tuned, ``seed<seed>/<system>`` is its training directory.
        systems: the rows; ``base`` is the model before fine-tuning.
        sets: test sets.
        seeds: random seeds.
        published: published figures, for columns beside ours.
        qbe_sets: test sets of a further table, of query-by-example search; none: no such table.
            Its scores are ``seed<seed>/<system>/qbe/scores.json``.

    Returns:
        Markdown. The minutes are those of fine-tuning with its validation. The learning rates are
        those of the best heads.

    Raises:
        InputError: a file in ``expdir`` is missing.
    """
    rows, collapse_rows = [], []
    for system in systems:
        directories = [Path(expdir) / f"seed{seed}" / system for seed in seeds]
        row = [system]
        for task in ERROR_RATES:
            cells = error_rate_cells(expdir, seeds, system, task, sets)
            row += published.beside(cells, task, sets, system)
            row.append(_learning_rates([path / "superb" / task / "best" for path in directories]))
        minutes = [None if system == "base" else _minutes(path) for path in directories]
        rows.append([*row, aggregate(minutes)])
        spreads = [read_collapse(path / "collapse.json") for path in directories]
        collapse_rows.append(
            [
                system,
                *(
                    aggregate([spread[name] for spread in spreads], decimals)
                    for name, (_, decimals) in COLLAPSE.items()
                ),
            ]
        )
    header = ["SSL model"]
    for task in ERROR_RATES:
        header += published.beside([f"{SHORT[task]} {name}" for name in sets], task, sets)
        header.append(f"lr for {SHORT[task]}")
    over = seeds_caption(seeds)
    sources = f"{text}\n" if (text := published.sources()) else ""
    table = markdown_table([*header, "minutes"], rows)
    search = ""
    if qbe_sets:
        labels = {system: system for system in systems}
        search = search_table(expdir, labels, qbe_sets, seeds, published, "SSL model") + "\n"
    spread = markdown_table(["SSL model", *(name for name, _ in COLLAPSE.values())], collapse_rows)
    return (
        f"Error rates (%), {over}; each head's learning rate is the best on the validation set; "
        f"minutes of fine-tuning:\n\n{table}\n{search}{sources}"
        "Last layer's features of the validation set, L2-normalised: mean distance of an "
        f"utterance's frames, and their effective rank, {over}:\n\n{spread}"
    )


def read_collapse(path: Path) -> Mapping[str, float]:
    """Read the measures that ``measure_collapse`` wrote.

    Raises:
        InputError: no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: run measure_collapse") from error


def _minutes(training: Path) -> float:
    """Return the minutes that a training's epochs took."""
    epochs = read_epochs(training)
    return sum(epoch[phase]["time"] for epoch in epochs for phase in epoch) / 60


def _learning_rates(heads: Sequence[Path]) -> str:
    """Return the learning rates of heads, each once, in ascending order."""
    rates = set()
    for head in heads:
        path = head / "config.yaml"
        try:
            rates.add(float(yaml.safe_load(path.read_text(encoding="utf-8"))["optim_conf"]["lr"]))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: train the head") from error
    return ", ".join(f"{rate:g}" for rate in sorted(rates))
