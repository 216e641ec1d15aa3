"""Write the report of an experiment: one HTML file, to be opened in a browser."""

import shlex
import sys
from pathlib import Path

from posinv.bin.cli import command_parser, names, run
from posinv.report.experiment import Experiment
from posinv.report.page import write_report
from posinv.report.results import Published, provenance


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("experiment", type=Path, help="--expdir of a recipe")
    add("--out", type=Path, help="HTML file; if not given, report.html in the experiment")
    add("--title", help="heading; if not given, the experiment's folder")
    add("--systems", type=names, help="rows of the tables, one argument: 'A B'; if not given, all")
    add("--seeds", type=names, help="random seeds, one argument: '1 2'; if not given, all")
    add("--published", type=Path, help="YAML list of published figures, to stand beside ours")
    add("--utterances", type=names, default=[], help="test utterances to listen to: 'A B'")
    add("--command", help="what made the results, to be noted; if not given, this command")
    args = parser.parse_args()
    experiment = Experiment.read(args.experiment, args.systems, args.seeds)
    path = args.experiment.resolve()
    out = args.out or args.experiment / "report.html"
    write_report(
        experiment,
        out,
        args.title or f"{path.parent.parent.name}/{path.parent.name}: {path.name}",
        provenance(args.command or shlex.join(sys.argv)),
        Published.read(args.published),
        args.utterances,
    )
    print(f"the report: {out.resolve()}")


if __name__ == "__main__":
    run(main)
