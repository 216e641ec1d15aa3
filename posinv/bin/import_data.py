"""Make a data directory of a Kaldi directory, or of Lhotse's cuts (cuts.jsonl.gz)."""

import argparse
from pathlib import Path

from posinv.bin.cli import run
from posinv.corpora.imported import import_cuts, import_kaldi
from posinv.corpora.lexicon import Lexicon


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--src", type=Path, required=True, help="Kaldi directory, or file of cuts")
    add("--out", type=Path, required=True, help="data directory to write")
    add("--lexicon", type=Path, nargs="+", help="pronunciation lexicons, where phn is not there")
    add("--g2p", action="store_true", help="predict the English words they lack")
    add("--wav_root", type=Path, default=Path(), help="where relative paths in wav.scp start")
    add("--nj", type=int, default=2, help="number of processes")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    lexicon = Lexicon.read(args.lexicon, args.g2p) if args.lexicon else None
    if args.src.is_dir():
        made = import_kaldi(args.src, args.out, lexicon, args.wav_root, args.nj)
    else:
        made = import_cuts(args.src, args.out, lexicon, args.nj)
    print(f"{args.out}: {made.utterances} utterances of {made.speakers} speakers")
    if made.cut_out:
        print(f"{args.out}: {made.cut_out} cut out of recordings, as FLAC")
    if made.renamed:
        print(f"{args.out}: {made.renamed} renamed, their speaker in front")
    if made.predicted:
        print(f"{args.out}: {made.predicted}")


if __name__ == "__main__":
    run(main)
