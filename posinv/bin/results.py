"""Print a speech enhancement recipe's results, and write them to a Markdown file."""

import argparse
from pathlib import Path

from posinv.bin.cli import run
from posinv.errors import InputError
from posinv.report.results import enhancement_report, provenance, write_results


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--expdir",
        type=Path,
        required=True,
        help="experiments: DIR/seed<seed>/<system>/superb/{pr,asr}/decode/scores.json and "
        "DIR/seed<seed>/<system>/enhanced/scores.json",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        required=True,
        metavar="SYSTEM[=LABEL]",
        help="rows of the tables, in order",
    )
    for name, what in (
        ("sets", "test sets of PER and WER"),
        ("se_sets", "test sets over which SI-SDR, STOI and PESQ are averaged"),
        ("seeds", "random seeds"),
    ):
        parser.add_argument(
            f"--{name}", type=_names, required=True, help=f"{what}, one argument: 'A B'"
        )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file, as RESULTS.md")
    parser.add_argument("--command", required=True, help="what made the results, to be noted")
    parser.add_argument("--title", default="Results", help="heading, if the file is a new one")
    return parser


def _names(argument: str) -> list[str]:
    names = argument.split()
    if not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"'{argument}': at least one name, and none twice")
    return names


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    systems: dict[str, str] = {}
    for entry in args.systems:
        system, _, label = entry.partition("=")
        if system in systems:
            raise InputError(f"--systems: {system} is named twice: name it once")
        systems[system] = label or system
    tables = enhancement_report(args.expdir, systems, args.sets, args.se_sets, args.seeds)
    body = f"{tables}\n{provenance(args.command)}"
    print(body, end="")
    write_results(args.out, args.title, body)


if __name__ == "__main__":
    run(main)
