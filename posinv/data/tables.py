"""Kaldi's tables, ``<id> <rest of line>``, sorted by id; tables with tabs and a header."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from posinv.data.files import read_text, write_atomic
from posinv.errors import InputError

# A line's end, as str.splitlines has it, is one, too. No file name, id or word needs any.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def read_table(path: Path | str, allow_empty: bool = False) -> dict[str, str]:
    """Read ``<id> <rest of line>`` lines, sorted by id in the C locale.

    Args:
        path: the file.
        allow_empty: let an id have no value, as what was recognised of an utterance may.

    Raises:
        InputError: no such file, nothing in it, an id without a value, twice, or out of order; a
            control character, or an id with a space of another kind.
    """
    path = Path(path)
    content = read_text(path, "make it, or correct its path")
    if not content.strip():
        raise InputError(f"{path}: empty: it must list at least one utterance")
    table: dict[str, str] = {}
    previous = ""
    for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
        if control := CONTROL.search(line):
            raise InputError(
                f"{path}: line {number}: the control character U+{ord(control[0]):04X}: remove it"
            )
        key, _, value = line.replace("\t", " ").partition(" ")
        value = value.strip()
        if not key or not (value or allow_empty):
            what = f"no transcript for utterance {key}" if key else "no id"
            if key and path.name not in ("text", "phn"):
                what = f"nothing after {key}"
            raise InputError(f"{path}: line {number}: {what}: add it or remove the line")
        if [key] != key.split():  # ESPnet ends an id at any of Unicode's spaces
            raise InputError(
                f"{path}: line {number}: id {key!a} has a space that isn't ASCII's: rename it"
            )
        if key in table:
            raise InputError(f"{path}: line {number}: duplicated id {key}: remove or rename one")
        if key < previous:
            raise InputError(
                f"{path}: line {number}: {key} is out of order: sort it with 'LC_ALL=C sort'"
            )
        table[key] = value
        previous = key
    return table


def write_table(path: Path | str, table: Mapping[str, object]) -> None:
    """Write ``<id> <value>`` lines, sorted by id, atomically."""
    write_atomic(path, "".join(f"{key} {table[key]}\n" for key in sorted(table)))


def read_token_list(path: Path | str) -> set[str]:
    """Read a token list: one token a line, as ESPnet writes them."""
    tokens = set(read_text(Path(path), "name a token list").splitlines())
    if not tokens:
        raise InputError(f"{path}: an empty token list")
    return tokens


def write_tsv(
    path: Path | str, columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write a header and a line for each row, cells between tabs, atomically.

    Args:
        path: the file.
        columns: the header.
        rows: each row's cells by column, without tabs and line ends; a missing one is empty.
    """
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    write_atomic(path, "".join("\t".join(line) + "\n" for line in lines))


def read_tsv(path: Path | str, columns: Iterable[str]) -> list[dict[str, str]]:
    """Read a file of :func:`write_tsv`: the cells of each row by column.

    Raises:
        InputError: no such file; a column of ``columns`` is missing; a line that has not as many
            cells as the header.
    """
    path = Path(path)
    try:
        header, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: score again") from None
    names = header.split("\t")
    if missing := set(columns) - set(names):
        raise InputError(f"{path}: no column {min(missing)}: score again")
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise InputError(f"{path}: line {number}: not {len(names)} cells: score again")
    return [dict(zip(names, row, strict=True)) for row in rows]
