"""What enh_results and ssft_results share: their options, and how they publish tables."""

import argparse
from pathlib import Path

from posinv.bin.cli import command_parser, names
from posinv.report.results import provenance, write_results
from posinv.report.skipped import left_out


def results_parser(description: str | None, experiments: str) -> argparse.ArgumentParser:
    """Return the options of a command that writes results; ``experiments`` tells what it reads."""
    parser = command_parser(description)
    add = parser.add_argument
    add("--expdir", type=Path, required=True, help=f"experiments: {experiments}")
    add("--sets", type=names, required=True, help="test sets of PER and WER, one argument: 'A B'")
    add("--seeds", type=names, required=True, help="random seeds, one argument: '1 2'")
    add("--out", type=Path, required=True, help="Markdown file, as RESULTS.md")
    add("--command", required=True, help="what made the results, to be noted")
    add("--title", default="Results", help="heading, if the file is a new one")
    add("--published", type=Path, help="YAML list of published figures, to stand beside ours")
    add("--dump", type=Path, help="formatted data; utterances that were left out are counted")
    add("--qbe_sets", type=names, default=[], help="test sets of query-by-example search: 'A B'")
    return parser


def publish(tables: str, args: argparse.Namespace) -> None:
    """Print tables and where they come from, and write both where :func:`results_parser` says."""
    skipped = left_out(args.dump) if args.dump else ""
    body = "\n".join(part for part in (tables, skipped, provenance(args.command)) if part)
    print(body, end="")
    write_results(args.out, args.title, body)
