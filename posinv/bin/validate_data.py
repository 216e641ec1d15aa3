"""Check a data directory: lists, transcripts and every audio file."""

from pathlib import Path

from posinv.bin.align_option import add_align
from posinv.bin.cli import command_parser, run
from posinv.data.directory import TokenKind, validate


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="data directory")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="of all audio, in Hz")
    for kind, name in (("phn", "phn"), ("word", "text"), ("char", "text")):
        parser.add_argument(
            f"--{kind}_tokens", type=Path, help=f"token list that '{name}' must keep to"
        )
    add_align(parser)
    parser.add_argument("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    lists: dict[TokenKind, Path | None] = {
        "phn": args.phn_tokens,
        "word": args.word_tokens,
        "char": args.char_tokens,
    }
    tokens = {kind: path for kind, path in lists.items() if path}
    samples = validate(args.directory, args.sampling_rate, tokens, args.nj, dict(args.align))
    print(f"{args.directory}: valid, {samples / args.sampling_rate / 60:.1f} minutes")


if __name__ == "__main__":
    run(main)
