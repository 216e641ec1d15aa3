"""Tables of results, before they become Markdown, LaTeX or HTML."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from posinv.errors import InputError
from posinv.report.results import aggregate, markdown_table, read_scores


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what to show.
        value: the figure in it, to sort by and to find the best by; None if there is none.
        marks: marks of significance, to show after the text.
        about: what the marks say, in words.
        values: the figure of each random seed, of which ``value`` is the mean.
    """

    text: str
    value: float | None = None
    marks: str = ""
    about: str = ""
    values: tuple[float | None, ...] = ()


class Column(NamedTuple):
    """A column: its header, and which figure in it is best: ``low``, ``high`` or none."""

    name: str
    best: str = ""


@dataclass
class Table:
    """A table with its caption.

    Attributes:
        title: what it shows, in a few words.
        caption: the same in full, without a full stop or colon at its end.
        columns: the columns.
        rows: the cells of each row.
        notes: paragraphs after the table.
    """

    title: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the caption, the table and its notes."""
        header = [column.name for column in self.columns]
        rows = [[f"{c.text} {c.marks}".rstrip() for c in row] for row in self.rows]
        notes = "".join(f"\n{note}\n" for note in self.notes if note)
        return f"{self.caption}:\n\n{markdown_table(header, rows)}{notes}"

    def best(self) -> set[tuple[int, int]]:
        """Return (row, column) of the best figures of the columns that have one.

        Figures that look alike are equally good; a column in which all do has no best one.
        """
        found = set()
        for k, column in enumerate(self.columns):
            known = [value for row in self.rows if (value := row[k].value) is not None]
            if not column.best or not known:
                continue
            value = min(known) if column.best == "low" else max(known)
            shown = {_figure(row[k].text) for row in self.rows if row[k].value == value}
            hits = {(r, k) for r, row in enumerate(self.rows) if _figure(row[k].text) in shown}
            if len(hits) < len(known):
                found |= hits
        return found


def _figure(text: str) -> str:
    return text.partition(" ")[0]


def figure(
    values: Sequence[float | None], decimals: int = 1, marks: str = "", about: str = ""
) -> Cell:
    """Return the cell of one figure for each random seed, see :func:`~.results.aggregate`."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known and len(known) == len(values) else None
    return Cell(aggregate(values, decimals), mean, marks, about, tuple(values))


class ScoreReader:
    """Reads scores; where one is missing, it raises an error or remembers that.

    Args:
        strict: raise :class:`~posinv.errors.InputError`.

    Attributes:
        missing: the messages of the scores that were missing.
    """

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.missing: list[str] = []

    def __call__(
        self, path: Path, sets: Sequence[str], keys: Sequence[str]
    ) -> Mapping[str, Mapping[str, float | None]]:
        """Return the scores as :func:`~.results.read_scores` does; None for what is missing."""
        try:
            return read_scores(path, sets, keys)
        except InputError as error:
            return self.lack(error, {name: dict.fromkeys(keys) for name in sets})

    def lack[T](self, error: InputError, instead: T) -> T:
        """Raise the error, or remember it and return what stands for the missing score."""
        if self.strict:
            raise error
        self.missing.append(str(error))
        return instead
