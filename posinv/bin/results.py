"""Print the results of experiments: tables, and differences with 95 % intervals."""

import logging
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.files import write_atomic
from posinv.report.experiment import Experiment
from posinv.report.results import Published
from posinv.report.summary import FORMATS, summarise_all


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("experiments", nargs="+", type=Path, help="--expdir of a recipe, one or more")
    add("--format", choices=FORMATS, default="md", help="of what is printed")
    add("--out", type=Path, help="write it into this file instead")
    add("--published", type=Path, help="YAML list of published figures, to stand beside ours")
    args = parser.parse_args()
    experiments = [Experiment.read(path) for path in args.experiments]
    summary = summarise_all(experiments, Published.read(args.published))
    if not summary.tables:
        logging.warning("no scores in %s", ", ".join(map(str, args.experiments)))
    text = FORMATS[args.format](summary)
    if args.out:
        write_atomic(args.out, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run(main)
