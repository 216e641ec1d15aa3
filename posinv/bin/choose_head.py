"""Choose the head with the lowest error rate on the validation set (SUPERB's learning-rate sweep).

--out becomes a link to the best head; the error rates of all heads go into <out>.json.
"""

import argparse
import json
from pathlib import Path

from posinv.bin.cli import run
from posinv.data.files import write_whole
from posinv.scoring.text import error_rate, read_transcripts


def main() -> None:
    """Score each head's transcripts and link the best head; of equals, the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    write_whole(
        args.out.with_suffix(".json"),
        json.dumps({head.name: rate for head, rate in rates.items()}, indent=2) + "\n",
    )
    args.out.unlink(missing_ok=True)
    args.out.symlink_to(best.name)


if __name__ == "__main__":
    run(main)
