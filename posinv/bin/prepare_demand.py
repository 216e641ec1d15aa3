"""Take channel 1 of DEMAND's recordings, at 16 kHz: folders of seen and of unseen noises."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.demand import prepare


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--demand", dest="src", type=Path, required=True, help="DEMAND: <environment>/ch01.wav")
    add("--out", type=Path, default=Path("data/demand"), help="parent of seen and unseen")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
