"""The tables of a recipe that fine-tunes SSL models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from posinv.errors import InputError
from posinv.report.curves import read_epochs
from posinv.report.error_rates import error_rate_cells, search_table
from posinv.report.experiment import Experiment
from posinv.report.results import (
    ABSENT,
    ERROR_RATES,
    NONE_PUBLISHED,
    SHORT,
    Published,
    seeds_caption,
)
from posinv.report.significance import Difference, differences, legend
from posinv.report.tables import Cell, Column, ScoreReader, Table, figure

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
    experiment = Experiment(Path(expdir), tuple(systems), tuple(seeds))
    found = differences(experiment, dict.fromkeys(ERROR_RATES, sets))
    tables = ssft_tables(experiment, sets, ScoreReader(), published, qbe_sets, found)
    return "\n".join(table.markdown() for table in tables)


def ssft_tables(
    experiment: Experiment,
    sets: Sequence[str],
    read: ScoreReader,
    published: Published,
    qbe_sets: Sequence[str],
    found: Sequence[Difference],
) -> list[Table]:
    """Return the tables of :func:`ssft_report`, with the marks of the comparisons found."""
    rows, collapse_rows = [], []
    for system in experiment.systems:
        row = [Cell(system)]
        for task in ERROR_RATES:
            cells = error_rate_cells(experiment, system, task, sets, read, found)
            row += published.beside(cells, task, sets, system, Cell)
            heads = [experiment.head(seed, system, task) for seed in experiment.seeds]
            row.append(Cell(_learning_rates(heads, read)))
        directories = [experiment.folder(seed, system) for seed in experiment.seeds]
        minutes = [None if system == "base" else _minutes(path, read) for path in directories]
        rows.append([*row, figure(minutes)])
        spreads = [_collapse(path / "collapse.json", read) for path in directories]
        collapse_rows.append(
            [
                Cell(system),
                *(
                    figure([spread[name] for spread in spreads], decimals)
                    for name, (_, decimals) in COLLAPSE.items()
                ),
            ]
        )
    columns = [Column("SSL model")]
    for task in ERROR_RATES:
        ours = [Column(f"{SHORT[task]} {name}", "low") for name in sets]
        columns += published.beside(ours, task, sets, make=Column)
        columns.append(Column(f"lr for {SHORT[task]}"))
    over = seeds_caption(experiment.seeds)
    tables = [
        Table(
            "Error rates",
            f"Error rates (%), {over}; each head's learning rate is the best on the validation "
            "set; minutes of fine-tuning",
            [*columns, Column("minutes")],
            rows,
            [legend(found, {})],
        )
    ]
    if qbe_sets:
        labels = {system: system for system in experiment.systems}
        tables.append(search_table(experiment, labels, qbe_sets, read, published, "SSL model"))
    tables[-1].notes.append(published.sources())
    tables.append(
        Table(
            "Spread of the features",
            "Last layer's features of the validation set, L2-normalised: mean distance of an "
            f"utterance's frames, and their effective rank, {over}",
            [Column("SSL model"), *(Column(name) for name, _ in COLLAPSE.values())],
            collapse_rows,
        )
    )
    return tables


def _collapse(path: Path, read: ScoreReader) -> Mapping[str, float | None]:
    try:
        return read_collapse(path)
    except InputError as error:
        return read.lack(error, dict.fromkeys(COLLAPSE))


def read_collapse(path: Path) -> Mapping[str, float]:
    """Read the measures that ``measure_collapse`` wrote.

    Raises:
        InputError: no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: run measure_collapse") from error


def _minutes(training: Path, read: ScoreReader) -> float | None:
    """Return the minutes that a training's epochs took."""
    try:
        epochs = read_epochs(training)
    except InputError as error:
        return read.lack(error, None)
    return sum(epoch[phase]["time"] for epoch in epochs for phase in epoch) / 60


def _learning_rates(heads: Sequence[Path], read: ScoreReader) -> str:
    """Return the learning rates of heads, each once, in ascending order."""
    rates = set()
    for head in heads:
        path = head / "config.yaml"
        try:
            rates.add(float(yaml.safe_load(path.read_text(encoding="utf-8"))["optim_conf"]["lr"]))
        except OSError as error:
            return read.lack(InputError(f"{path}: {error.strerror}: train the head"), ABSENT)
    return ", ".join(f"{rate:g}" for rate in sorted(rates))
