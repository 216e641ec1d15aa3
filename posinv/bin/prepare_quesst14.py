"""Write the folder of QUESST 2014's search: the English queries in the English documents."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.quesst14 import prepare


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--quesst14", dest="src", type=Path, required=True, help="the folder quesst14Database")
    add("--split", choices=("dev", "eval"), required=True, help="the queries")
    add("--out", type=Path, required=True, help="folder to write; its name is the test set's")
    add("--nj", type=int, default=2, help="number of processes")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
