"""Synthesise the corpus of egs/mini: data directories train, dev and test."""

import argparse
from pathlib import Path

from posinv.bin.cli import run
from posinv.corpora.mini import prepare


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("data"), help="parent of the data directories")
    add("--minutes", type=float, default=20.0, help="of training speech, at least")
    add("--dev_minutes", type=float, default=1.5, help="of development speech, at least")
    add("--test_minutes", type=float, default=2.0, help="of test speech, at least")
    add("--seed", type=int, default=0, help="of every draw")
    add("--nj", type=int, default=2, help="number of processes")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    for split, minutes in prepare(**vars(args)).items():
        print(f"{args.out / split}: {minutes:.1f} minutes")


if __name__ == "__main__":
    run(main)
