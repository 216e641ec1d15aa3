"""Join FSDD's single digits into connected-digit data directories train, dev and test."""

import argparse
from pathlib import Path

from posinv.bin.cli import corpus_parser, run
from posinv.corpora.fsdd import prepare


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = corpus_parser(__doc__, minutes=27.0, dev_minutes=1.5, test_minutes=3.0)
    parser.add_argument(
        "--recordings", type=Path, required=True, help="of {digit}_{speaker}_{index}.wav files"
    )
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    for split, minutes in prepare(**vars(args)).items():
        print(f"{args.out / split}: {minutes:.1f} minutes")


if __name__ == "__main__":
    run(main)
