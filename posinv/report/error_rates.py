"""The tables that both recipes have: error rates, and query-by-example search."""

from collections.abc import Mapping, Sequence

from posinv.report.experiment import Experiment
from posinv.report.results import ERROR_RATES, QUERY_SEARCH, SHORT, Published, seeds_caption
from posinv.report.significance import Difference, about, marks
from posinv.report.tables import Cell, Column, ScoreReader, Table, figure


def error_rate_cells(
    experiment: Experiment,
    system: str,
    task: str,
    sets: Sequence[str],
    read: ScoreReader,
    found: Sequence[Difference],
) -> list[Cell]:
    """Return the cells of a table's row: a system's error rate in each test set.

    Args:
        experiment: the experiment.
        system: name of the system.
        task: ``pr`` or ``asr``.
        sets: test sets.
        read: reads the scores.
        found: the comparisons; cells that differ significantly are marked.

    Raises:
        InputError: a score is missing.
    """
    signs = marks(found)
    of_seeds = [
        read(experiment.decoded(seed, system, task) / "scores.json", sets, ["rate"])
        for seed in experiment.seeds
    ]
    cells = []
    for name in sets:
        rates = [scores[name]["rate"] for scores in of_seeds]
        said = about(found, task, name, system)
        cells.append(figure(rates, marks=signs.get((task, name, system), ""), about=said))
    return cells


def error_rate_table(
    experiment: Experiment,
    labels: Mapping[str, str],
    task: str,
    sets: Sequence[str],
    read: ScoreReader,
    published: Published,
    found: Sequence[Difference],
) -> Table:
    """Return a task's error rates as a table, with one row for each system in ``labels``."""
    rows = []
    for system, label in labels.items():
        cells = error_rate_cells(experiment, system, task, sets, read, found)
        rows.append([Cell(label), *published.beside(cells, task, sets, system, Cell)])
    columns = [Column(name, "low") for name in sets]
    return Table(
        ERROR_RATES[task].partition(" (")[0],
        f"{ERROR_RATES[task]}, {seeds_caption(experiment.seeds)}",
        [Column("system"), *published.beside(columns, task, sets, make=Column)],
        rows,
    )


def search_table(
    experiment: Experiment,
    labels: Mapping[str, str],
    sets: Sequence[str],
    read: ScoreReader,
    published: Published,
    corner: str,
) -> Table:
    """Return the table of query-by-example search: each system's MTWV.

    Args:
        experiment: the experiment.
        labels: the row's label for each system.
        sets: test sets that are searched.
        read: reads the scores.
        published: published figures, for columns beside ours.
        corner: header of the first column.

    Raises:
        InputError: a score is missing.
    """
    rows = []
    for system, label in labels.items():
        of_seeds = [
            read(experiment.folder(seed, system) / "qbe" / "scores.json", sets, ["mtwv"])
            for seed in experiment.seeds
        ]
        of_sets = [[scores[name]["mtwv"] for scores in of_seeds] for name in sets]
        cells = [figure([None if x is None else 100 * x for x in mtwv]) for mtwv in of_sets]
        rows.append([Cell(label), *published.beside(cells, "qbe", sets, system, Cell)])
    columns = [Column(name, "high") for name in sets]
    return Table(
        f"Query-by-example search ({SHORT['qbe']})",
        f"{QUERY_SEARCH}, {seeds_caption(experiment.seeds)}",
        [Column(corner), *published.beside(columns, "qbe", sets, make=Column)],
        rows,
    )
