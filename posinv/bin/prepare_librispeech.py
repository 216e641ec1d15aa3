"""Write a data directory of a subset of LibriSpeech, with phonemes from lexicons."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.lexicon import Lexicon
from posinv.corpora.librispeech import prepare


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--librispeech", dest="src", type=Path, required=True, help="the folder LibriSpeech")
    add(
        "--lexicon", type=Path, nargs="+", required=True, help="files; the first with a word counts"
    )
    add("--subset", required=True, help="such as train-clean-100")
    add("--out", type=Path, required=True, help="data directory to write")
    add("--nj", type=int, default=2, help="number of processes")
    options = vars(parser.parse_args())
    print(prepare(**options | {"lexicon": Lexicon.read(options["lexicon"])}))


if __name__ == "__main__":
    run(main)
