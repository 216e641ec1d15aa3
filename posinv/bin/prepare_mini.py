"""Synthesise the corpus of egs/mini: data directories train, dev and test."""

from posinv.bin.cli import corpus_parser, run
from posinv.corpora.mini import prepare


def main() -> None:
    """Run the command."""
    parser = corpus_parser(__doc__, minutes=20.0, dev_minutes=1.5, test_minutes=2.0)
    parser.add_argument("--phrases", type=int, default=1, help="in an utterance, 2 to 3 s each")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
