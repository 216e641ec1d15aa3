"""What the benchmarks share: options, and how results are left."""

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
    """Return the options of every benchmark; quick says what --quick makes it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add("--out", type=Path, required=True, help="folder of the CSV and the plot")
    add("--quick", action="store_true", help=quick)
    return parser


def check_device(device: str) -> None:
    """Raise InputError if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU: use --device cpu")


def leave_results(
    path: Path, settings: str, columns: Sequence[str], records: Sequence[Sequence[str]]
) -> None:
    """Write a CSV, with where it comes from as comments, and print both, the table last.

    Args:
        path: the CSV.
        settings: lines of Markdown beside command, machine and versions.
        columns: their names.
        records: rows of cells.
    """
    origin = provenance(shlex.join(["python", *sys.argv])) + settings
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in origin.splitlines())
    csv.writer(text, lineterminator="\n").writerows([columns, *records])
    write_atomic(path, text.getvalue())
    print(origin)
    print(markdown_table(columns, records), end="")
