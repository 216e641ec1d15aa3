"""The tables and comparisons of any experiments, as Markdown, CSV, JSON or LaTeX."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from posinv.errors import InputError
from posinv.report.enhancement import enhancement_tables
from posinv.report.experiment import Experiment
from posinv.report.results import ERROR_RATES, METRICS, NONE_PUBLISHED, Published
from posinv.report.significance import (
    LEVEL,
    Difference,
    compare,
    compare_measures,
    differences,
)
from posinv.report.ssft import ssft_tables
from posinv.report.tables import Cell, Column, ScoreReader, Table

SIGNS = {"*": "*", "\N{DAGGER}": r"\dagger", "\N{DOUBLE DAGGER}": r"\ddagger"}
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


@dataclass
class Summary:
    """What there is to say about experiments.

    Attributes:
        tables: the tables.
        found: the comparisons.
        missing: what is not there, a message each.
    """

    tables: list[Table]
    found: list[Difference]
    missing: list[str]


def summarise(experiment: Experiment, published: Published = NONE_PUBLISHED) -> Summary:
    """Return an experiment's tables and comparisons, as far as there are scores.

    Raises:
        InputError: systems that were scored on different transcripts.
    """
    read = ScoreReader(strict=False)
    found = differences(experiment)
    labels = experiment.labels
    if not experiment.systems or not experiment.seeds:
        tables = []
    elif experiment.tunes_enhancement:
        tables = enhancement_tables(
            experiment,
            labels,
            experiment.sets,
            experiment.enh_sets,
            read,
            published,
            experiment.qbe_sets,
            found,
        )
    else:
        tables = ssft_tables(
            experiment, experiment.sets, read, published, experiment.qbe_sets, found
        )
    shown = [table for table in tables if len(table.columns) > 1]
    labelled = [
        replace(one, system=labels[one.system], reference=labels[one.reference]) for one in found
    ]
    return Summary(shown, labelled, list(dict.fromkeys(read.missing)))


def summarise_all(
    experiments: Sequence[Experiment], published: Published = NONE_PUBLISHED
) -> Summary:
    """Return the tables of several experiments in one, a row for each system of each.

    Each system is also compared with the system of the same name in the experiment before,
    where both were scored on the same transcripts. Rows are named ``<experiment>: <system>``, an
    experiment by the parts of its path that the others do not have.
    """
    summaries = [summarise(experiment, published) for experiment in experiments]
    if len(experiments) == 1:
        return summaries[0]
    names = _short_names([experiment.path for experiment in experiments])
    joined = join_summaries(dict(zip(names, summaries, strict=True)))
    for (name, first), (other, second) in pairwise(zip(names, experiments, strict=True)):
        joined.found += _across(name, first, other, second)
    return joined


def join_summaries(summaries: Mapping[str, Summary]) -> Summary:
    """Return several experiments' summaries in one, whose rows are ``<experiment>: <system>``."""
    tables: dict[str, Table] = {}
    found, missing = [], []
    for name, summary in summaries.items():
        missing += summary.missing
        for one in summary.found:
            system, reference = (f"{name}: {of}" for of in (one.system, one.reference))
            found.append(replace(one, system=system, reference=reference))
        for table in summary.tables:
            rows = [[Cell(f"{name}: {row[0].text}"), *row[1:]] for row in table.rows]
            table = replace(table, rows=rows)
            before = tables.get(table.title)
            tables[table.title] = _below(before, table) if before else table
    return Summary(list(tables.values()), found, missing)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths without the parts that all of them begin and end with."""
    parts = [path.resolve().parts for path in paths]
    shortest = min(map(len, parts))
    same = [len({of[k] for of in parts}) == 1 for k in range(-shortest, shortest)]
    last, first = same[:shortest], same[shortest:]
    start = next((k for k, alike in enumerate(first) if not alike), 0)
    end = next((k for k, alike in enumerate(reversed(last)) if not alike), 0)
    names = ["/".join(of[start : len(of) - end]) for of in parts]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _below(first: Table, second: Table) -> Table:
    """Return a table with the rows of both, and the columns of both by name."""
    columns = [*dict.fromkeys([*first.columns, *second.columns])]

    def widened(table: Table) -> list[list[Cell]]:
        rows = []
        for row in table.rows:
            cells = dict(zip(table.columns, row, strict=True))
            rows.append([cells.get(column, Cell("")) for column in columns])
        return rows

    caption = first.caption if first.caption == second.caption else first.title
    notes = [*dict.fromkeys([*first.notes, *second.notes])]
    return Table(first.title, caption, columns, widened(first) + widened(second), notes)


def _across(name: str, first: Experiment, other_name: str, second: Experiment) -> list[Difference]:
    comparisons = [partial(compare, task, name) for task in ERROR_RATES for name in second.sets]
    comparisons += [partial(compare_measures, metric, second.enh_sets) for metric in METRICS]
    found = []
    for comparison in comparisons:
        for system in second.systems:
            try:
                one = comparison((second, system), (first, system))
            except InputError:  # another corpus
                continue
            if one is not None:
                label = second.labels[system]
                ours, theirs = f"{other_name}: {label}", f"{name}: {label}"
                found.append(replace(one, system=ours, reference=theirs))
    return found


def difference_table(found: Sequence[Difference]) -> Table:
    """Return the comparisons as a table."""
    rows = [
        [
            Cell(one.system),
            Cell(one.reference),
            Cell(one.measure),
            Cell(one.test_set),
            Cell(one.show(one.value), one.value),
            Cell(one.interval),
            Cell("yes" if one.significant else "no"),
            Cell(f"{one.units} {one.unit}", float(one.units)),
            Cell(", ".join(one.seeds)),
        ]
        for one in found
    ]
    names = ("system", "against", "measure", "test set", "difference", "95 % interval")
    columns = [Column(name) for name in (*names, "excludes 0", "drawn", "seeds")]
    return Table(
        "Differences",
        "Differences with 95 % intervals (paired bootstrap): error rates in percentage points, "
        "below 0 where the system is better; measures of enhanced speech, above 0 where it is "
        "better",
        columns,
        rows,
    )


def to_markdown(summary: Summary) -> str:
    """Return the tables, the comparisons, and what is missing."""
    tables = [*summary.tables, *([difference_table(summary.found)] if summary.found else [])]
    parts = [table.markdown() for table in tables]
    if summary.missing:
        parts.append("Missing:\n\n" + "".join(f"- {message}\n" for message in summary.missing))
    return "\n".join(parts)


def to_latex(summary: Summary) -> str:
    """Return the tables as LaTeX (package booktabs), with the best figures in bold."""
    parts = []
    for table in summary.tables:
        best = table.best()
        lines = [" & ".join(_escaped(column.name) for column in table.columns)]
        for r, row in enumerate(table.rows):
            cells = [_latex_cell(cell, (r, k) in best) for k, cell in enumerate(row)]
            lines.append(" & ".join(cells))
        header, *rows = (f"{line} \\\\" for line in lines)
        body = "\n".join(["\\toprule", header, "\\midrule", *rows, "\\bottomrule"])
        notes = " ".join(f"{_escaped(note)}" for note in table.notes if note)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{_escaped(table.caption)}. {notes}}}\n"
            f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}\n{body}\n"
            "\\end{tabular}\n\\end{table}\n"
        )
    return "\n".join(parts)


def _latex_cell(cell: Cell, best: bool) -> str:
    text = _escaped(cell.text)
    marks = "".join(SIGNS[mark] for mark in cell.marks)
    return (f"\\textbf{{{text}}}" if best else text) + (f"$^{{{marks}}}$" if marks else "")


def _escaped(text: str) -> str:
    signs = {"\N{PLUS-MINUS SIGN}": r"$\pm$", "\N{EN DASH}": "--"} | {
        mark: f"$^{{{sign}}}$" for mark, sign in SIGNS.items() if mark != "*"
    }
    return "".join((LATEX | signs).get(sign, sign) for sign in text)


def to_json(summary: Summary) -> str:
    """Return all figures, for each random seed, and all comparisons; missing ones are null."""
    tables = [
        {
            "title": table.title,
            "caption": table.caption,
            "rows": [
                {
                    "system": row[0].text,
                    **{
                        column.name: _json_cell(cell)
                        for column, cell in zip(table.columns[1:], row[1:], strict=True)
                    },
                }
                for row in table.rows
            ],
        }
        for table in summary.tables
    ]
    found = [
        {name: None if value != value else value for name, value in asdict(one).items()}
        | {"level": LEVEL, "significant": one.significant}
        for one in summary.found
    ]
    content = {"tables": tables, "differences": found, "missing": summary.missing}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _json_cell(cell: Cell) -> Any:
    if not cell.values:
        return cell.text
    return {"mean": cell.value, "sd": _deviation(cell), "seeds": list(cell.values)}


def _deviation(cell: Cell) -> float | None:
    known = [value for value in cell.values if value is not None]
    return statistics.stdev(known) if len(known) == len(cell.values) > 1 else None


def to_csv(summary: Summary) -> str:
    """Return a row for each figure and each comparison, for spreadsheets and pandas."""
    out = io.StringIO()
    columns = ("kind", "measure", "system", "column", "against", "value", "sd", "low", "high")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns, "seeds"])
    for table in summary.tables:
        for row in table.rows:
            for column, cell in zip(table.columns[1:], row[1:], strict=True):
                if cell.value is not None:
                    spread = _deviation(cell)
                    figures = cell.value, "" if spread is None else spread, "", ""
                    names = "figure", table.title, row[0].text, column.name, ""
                    writer.writerow([*names, *figures, len(cell.values)])
    for one in summary.found:
        names = "difference", one.measure, one.system, one.test_set, one.reference
        ends = ["" if math.isnan(end) else end for end in (one.low, one.high)]
        writer.writerow([*names, one.value, "", *ends, len(one.seeds)])
    return out.getvalue()


FORMATS = {"md": to_markdown, "csv": to_csv, "json": to_json, "latex": to_latex}
