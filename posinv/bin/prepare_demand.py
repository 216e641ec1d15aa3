"""Take channel 1 of DEMAND's recordings, at 16 kHz: folders of seen and of unseen noises."""

import argparse
from pathlib import Path

from posinv.bin.cli import run
from posinv.corpora.demand import prepare


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--demand", type=Path, required=True, help="DEMAND: <environment>/ch01.wav")
    add("--out", type=Path, default=Path("data/demand"), help="parent of seen and unseen")
    args = parser.parse_args()
    for split, minutes in prepare(args.demand, args.out).items():
        print(f"{args.out / split}: {minutes:.1f} minutes")


if __name__ == "__main__":
    run(main)
