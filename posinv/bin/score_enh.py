"""Score enhanced speech: SI-SDR, STOI, PESQ and DNSMOS of each test set, and of each utterance."""

import json
from pathlib import Path

from posinv.bin.cli import command_parser, names, run
from posinv.data.files import write_atomic
from posinv.data.tables import write_tsv
from posinv.scoring.enhancement import ENHANCEMENT_METRICS, score_enhancement


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--ref_scp", type=Path, required=True, help="clean references")
    parser.add_argument("--inf_scp", type=Path, required=True, help="enhanced speech")
    parser.add_argument(
        "--utt2set", type=Path, required=True, help="'<utterance id> <test set>' lines"
    )
    parser.add_argument(
        "--sets", type=names, default=(), help="score these test sets alone, as one argument: 'A B'"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSON file for the means of each set; the scores of each utterance go into .tsv "
        "beside it",
    )
    parser.add_argument(
        "--sampling_rate", type=int, default=16000, help="sampling rate of all audio, in Hz"
    )
    parser.add_argument("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    means, rows = score_enhancement(
        args.ref_scp, args.inf_scp, args.utt2set, args.sampling_rate, args.nj, args.sets
    )
    columns = ("utterance", "set", *ENHANCEMENT_METRICS)
    write_tsv(args.out.with_suffix(".tsv"), columns, rows)
    write_atomic(args.out, json.dumps(means, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
