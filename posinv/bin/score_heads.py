"""Choose the best head of each task on the validation set, and score the test sets with it.

Of DIR/<task>, the heads of a task, the one with the lowest error rate in decode_valid/text becomes
DIR/<task>/best, a link; DIR/<task>/best.json has the error rates of all. Its decode/text is scored:
decode/scores.json has the error rate of each test set, scores.tsv the errors of each utterance,
scores.txt the alignments that have errors.
"""

import argparse
import json
from pathlib import Path
from typing import cast, get_args

from posinv.bin.cli import command_parser, run
from posinv.data.files import atomic_file, write_atomic
from posinv.data.tables import write_tsv
from posinv.scoring.text import (
    UTTERANCE_COLUMNS,
    Unit,
    error_rate,
    read_transcripts,
    score_text,
)


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="parent of the tasks' folders")
    add(
        "--task",
        nargs="+",
        action="append",
        required=True,
        metavar="WORD",
        help="a task's folder, its unit (word, phone or char), the file name of its references, "
        "as text, and its heads; for each task",
    )
    add("--valid", type=Path, required=True, help="folder of the validation set's references")
    add("--test", type=Path, required=True, help="folder of the test sets' references, and utt2set")
    args = parser.parse_args()
    for name, unit, *_ in (task for task in args.task if len(task) > 1):
        if unit not in get_args(Unit):
            parser.error(f"--task {name} {unit}: the unit must be of {', '.join(get_args(Unit))}")
    for task in args.task:
        if len(task) < 4:
            parser.error(f"--task {' '.join(task)}: needs a folder, unit, file name and heads")
        score_task(args, *task)


def score_task(args: argparse.Namespace, name: str, unit: str, text: str, *heads: str) -> None:
    """Choose a task's best head; of equals, the first. Score it."""
    folder, unit = args.dir / name, cast(Unit, unit)
    rates = {}
    for head in heads:
        pair = read_transcripts(args.valid / text, folder / head / "decode_valid" / "text")
        rates[head] = error_rate(*pair, unit).rate
    best = min(rates, key=rates.__getitem__)
    for head, rate in rates.items():
        print(f"{folder / head}: {unit} error rate {rate:.2f} %{', the best' * (head == best)}")
    decoded = folder / best / "decode"
    files = (args.test / text, decoded / "text", args.test / "utt2set")
    scores, utterances, alignments = score_text(*files, unit)
    write_atomic(folder / "best.json", json.dumps(rates, indent=2) + "\n")
    with atomic_file(folder / "best") as temporary:
        temporary.symlink_to(best)
    write_tsv(decoded / "scores.tsv", UTTERANCE_COLUMNS, utterances)
    write_atomic(decoded / "scores.txt", alignments)
    write_atomic(decoded / "scores.json", json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
