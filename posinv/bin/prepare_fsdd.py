"""Join FSDD's single digits into connected-digit data directories train, dev and test."""

from pathlib import Path

from posinv.bin.cli import corpus_parser, run
from posinv.corpora.fsdd import prepare


def main() -> None:
    """Run the command."""
    parser = corpus_parser(__doc__, minutes=27.0, dev_minutes=1.5, test_minutes=3.0)
    parser.add_argument(
        "--recordings",
        dest="src",
        type=Path,
        required=True,
        help="of {digit}_{speaker}_{index}.wav files",
    )
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
