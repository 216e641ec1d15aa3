"""Make a data directory of a Kaldi directory, or of Lhotse's cuts (cuts.jsonl.gz)."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.imported import MAX_OVERSHOOT, import_cuts, import_kaldi
from posinv.corpora.lexicon import Lexicon


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--src", type=Path, required=True, help="Kaldi directory, or file of cuts")
    add("--out", type=Path, required=True, help="data directory to write")
    add("--lexicon", type=Path, nargs="+", help="pronunciation lexicons, where phn is not there")
    add("--g2p", action="store_true", help="predict the English words they lack")
    add("--wav_root", type=Path, default=Path(), help="where relative paths of audio start")
    add(
        "--channel",
        type=int,
        help="which channel of stereo recordings and MultiCuts, 1 for the first, 0 for their mean",
    )
    add(
        "--max_overshoot",
        type=float,
        default=MAX_OVERSHOOT,
        help="seconds by which a segment or supervision may end after its recording",
    )
    add(
        "--allow_pipes",
        action="store_true",
        help="run commands that stand in place of audio; without it, they are named and refused",
    )
    add("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    lexicon = Lexicon.read(args.lexicon, args.g2p) if args.lexicon else None
    import_data = import_kaldi if args.src.is_dir() else import_cuts
    made = import_data(
        args.src,
        args.out,
        lexicon=lexicon,
        wav_root=args.wav_root,
        channel=args.channel,
        max_overshoot=args.max_overshoot,
        allow_pipes=args.allow_pipes,
        nj=args.nj,
    )
    print(made)


if __name__ == "__main__":
    run(main)
