"""Choose the head with the lowest error rate on the validation set (SUPERB's learning-rate sweep).

--out becomes a link to the best head; the error rates of all heads go into <out>.json.
"""

import json
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.files import atomic_file, write_atomic
from posinv.scoring.text import error_rate, read_transcripts


def main() -> None:
    """Score each head's transcripts and link the best head; of equals, the first."""
    parser = command_parser(__doc__)
    parser.add_argument("--heads", nargs="+", type=Path, required=True, help="training directories")
    parser.add_argument("--decoded", default="decode_valid/text", help="the transcripts in each")
    parser.add_argument("--ref", type=Path, required=True, help="references, as in data/*/text")
    parser.add_argument(
        "--unit", choices=("word", "phone", "char"), required=True, help="the tokens to count"
    )
    parser.add_argument("--out", type=Path, required=True, help="the link, in the heads' folder")
    args = parser.parse_args()
    rates = {
        head: error_rate(*read_transcripts(args.ref, head / args.decoded), args.unit).rate
        for head in args.heads
    }
    best = min(rates, key=rates.__getitem__)
    for head, rate in rates.items():
        print(f"{head}: {args.unit} error rate {rate:.2f} %{', the best' * (head == best)}")
    write_atomic(
        args.out.with_suffix(".json"),
        json.dumps({head.name: rate for head, rate in rates.items()}, indent=2) + "\n",
    )
    with atomic_file(args.out) as temporary:
        temporary.symlink_to(best.name)


if __name__ == "__main__":
    run(main)
