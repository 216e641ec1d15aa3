"""Code that the benchmarks share: their options, and the output of their results."""

import argparse
import csv
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from posinv.data.files import write_atomic
from posinv.errors import InputError
from posinv.report.results import markdown_table, provenance


def benchmark_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; ``quick`` is the help of --quick."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: cpu)")
    add("--out", type=Path, required=True, help="folder for the CSV and the plot")
    add("--quick", action="store_true", help=quick)
    return parser


def check_device(device: str) -> None:
    """Raise InputError if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU: use --device cpu")


def write_benchmark(
    path: Path, settings: str, columns: Sequence[str], records: Sequence[Sequence[str]]
) -> None:
    """Write the results as CSV, with comments that say how they were made, and print both.

    Args:
        path: the CSV file.
        settings: further comments, after command, machine and versions: a Markdown list.
        columns: names of the columns.
        records: the rows' cells.
    """
    origin = provenance(shlex.join(["python", *sys.argv])) + settings
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in origin.splitlines())
    csv.writer(text, lineterminator="\n").writerows([columns, *records])
    write_atomic(path, text.getvalue())
    print(origin)
    print(markdown_table(columns, records), end="")
