"""Score transcripts: the error rate of each test set, and each utterance's errors."""

import json
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.files import write_atomic
from posinv.data.tables import write_tsv
from posinv.scoring.text import UTTERANCE_COLUMNS, score_text


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--ref", type=Path, required=True, help="references, as in data/*/text")
    parser.add_argument("--hyp", type=Path, required=True, help="hypotheses, the same utterances")
    parser.add_argument(
        "--utt2set", type=Path, required=True, help="'<utterance id> <test set>' lines"
    )
    parser.add_argument(
        "--unit", choices=("word", "phone", "char"), required=True, help="the tokens to count"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSON file for the error rate of each set; beside it, .tsv gets the errors of each "
        "utterance, and .txt the alignments that have errors",
    )
    args = parser.parse_args()
    scores, utterances, alignments = score_text(args.ref, args.hyp, args.utt2set, args.unit)
    write_tsv(args.out.with_suffix(".tsv"), UTTERANCE_COLUMNS, utterances)
    write_atomic(args.out.with_suffix(".txt"), alignments)
    write_atomic(args.out, json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
