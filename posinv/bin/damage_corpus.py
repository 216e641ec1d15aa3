"""Make damaged copies of a data directory, one a kind of damage, to see what is said of each.

The source is only read. OUT/<kind> gets the lists, and OUT/<kind>/audio the damaged audio; other
audio stays where it is. Then: python -m posinv.bin.format_data --src OUT/<kind> --out SOMEWHERE
"""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.damage import KINDS, damage_corpus, kinds_table
from posinv.errors import InputError


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--src", type=Path, help="data directory to copy")
    add("--out", type=Path, help="folder to write")
    add("--kinds", nargs="+", default=["all"], metavar="KIND", help=f"all, or: {', '.join(KINDS)}")
    add("--utterances", type=int, default=1, help="how many are damaged in each copy")
    add("--seed", type=int, default=0, help="of their draw")
    add("--table", action="store_true", help="print the kinds and what becomes of them, and end")
    args = parser.parse_args()
    if args.table:
        print(kinds_table(), end="")
        return
    if args.src is None or args.out is None:
        raise InputError("give --src and --out, or --table")
    for kind in KINDS if args.kinds == ["all"] else args.kinds:
        utts = damage_corpus(args.src, args.out / kind, kind, args.utterances, args.seed)
        print(f"{args.out / kind}: {', '.join(utts)}")


if __name__ == "__main__":
    run(main)
