"""Make data directories train, dev and test of CMU AN4 in its original layout."""

import argparse
from pathlib import Path

from posinv.bin.cli import run
from posinv.corpora.an4 import prepare


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--an4", type=Path, required=True, help="the corpus, with etc/ and wav/")
    add("--out", type=Path, default=Path("data"), help="parent of the data directories")
    add("--dev_fraction", type=float, default=0.1, help="of training speakers, for validation")
    add("--seed", type=int, default=0, help="of that draw")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    prepared = prepare(**vars(args))
    for split, count in prepared.utterances.items():
        print(f"{args.out / split}: {count} utterances of {prepared.speakers[split]} speakers")
    if prepared.left_out:
        names = ", ".join(path.name for path in prepared.left_out)
        print(f"left out, having no transcript: {len(prepared.left_out)} audio files: {names}")


if __name__ == "__main__":
    run(main)
