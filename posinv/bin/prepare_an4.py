"""Make data directories train, dev and test of CMU AN4 in its original layout."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.an4 import prepare


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--an4", dest="src", type=Path, required=True, help="the corpus, with etc/ and wav/")
    add("--out", type=Path, default=Path("data"), help="parent of the data directories")
    add("--dev_fraction", type=float, default=0.1, help="of training speakers, for validation")
    add("--seed", type=int, default=0, help="of that draw")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
