"""Synthesise the corpus of egs/mini: data directories train, dev and test."""

import argparse

from posinv.bin.cli import corpus_parser, run
from posinv.corpora.mini import prepare


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return corpus_parser(__doc__, minutes=20.0, dev_minutes=1.5, test_minutes=2.0)


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    for split, minutes in prepare(**vars(args)).items():
        print(f"{args.out / split}: {minutes:.1f} minutes")


if __name__ == "__main__":
    run(main)
