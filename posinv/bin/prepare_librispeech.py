"""Write a data directory of a subset of LibriSpeech, with phonemes from lexicons."""

import argparse
from pathlib import Path

from posinv.bin.cli import run
from posinv.corpora.lexicon import Lexicon
from posinv.corpora.librispeech import prepare


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--librispeech", type=Path, required=True, help="the unpacked folder LibriSpeech")
    add(
        "--lexicon", type=Path, nargs="+", required=True, help="files; the first with a word counts"
    )
    add("--subset", required=True, help="such as train-clean-100")
    add("--out", type=Path, required=True, help="data directory to write")
    add("--nj", type=int, default=2, help="number of processes")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    lexicon = Lexicon.read(args.lexicon)
    utterances, speakers = prepare(args.librispeech, args.subset, args.out, lexicon, args.nj)
    print(f"{args.out}: {utterances} utterances, {speakers} speakers")
    print(f"{args.out}: {lexicon.describe_predicted()}")


if __name__ == "__main__":
    run(main)
