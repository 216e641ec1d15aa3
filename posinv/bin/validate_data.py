"""Check a data directory: lists, transcripts and every audio file."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.directory import TokenKind, validate
from posinv.data.files import read_yaml


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="data directory")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="of all audio, in Hz")
    for kind, name in (("phn", "phn"), ("word", "text"), ("char", "text")):
        parser.add_argument(
            f"--{kind}_tokens", type=Path, help=f"token list that '{name}' must keep to"
        )
    for task in ("pr", "asr"):
        parser.add_argument(
            f"--{task}_config",
            type=Path,
            help=f"configuration of the {task.upper()} head, whose encoder may stack frames",
        )
    parser.add_argument("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    lists: dict[TokenKind, Path | None] = {
        "phn": args.phn_tokens,
        "word": args.word_tokens,
        "char": args.char_tokens,
    }
    tokens = {kind: path for kind, path in lists.items() if path}
    words = _stack("--asr_config", args.asr_config)
    stack: dict[TokenKind, int] = {
        "phn": _stack("--pr_config", args.pr_config),
        "word": words,
        "char": words,
    }
    samples = validate(args.directory, args.sampling_rate, tokens, args.nj, stack)
    print(f"{args.directory}: valid, {samples / args.sampling_rate / 60:.1f} minutes")


def _stack(option: str, path: Path | None) -> int:
    config = read_yaml(path, option) if path else None
    conf = config.get("encoder_conf") if isinstance(config, dict) else None
    return conf.get("stack", 1) if isinstance(conf, dict) else 1


if __name__ == "__main__":
    run(main)
