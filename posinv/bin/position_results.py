"""Compare the criteria over SSL models whose features hold more or less position.

Each experiment is an --expdir of enh.sh that position_probe has measured, in its folder position.
"""

import json
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.files import atomic_file
from posinv.errors import InputError
from posinv.report.convergence import fine_tuning_curves
from posinv.report.experiment import Experiment
from posinv.report.position import comparison_figure, comparison_tables, convergence_drawing
from posinv.report.results import provenance, write_results
from posinv.report.summary import join_summaries, summarise


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("experiments", nargs="+", type=Path, help="one for each SSL model")
    add("--command", required=True, help="what made the results, to be noted")
    add("--title", default="Position and the criteria", help="heading, if the file is a new one")
    add(
        "--out",
        type=Path,
        required=True,
        help="Markdown file; position.png and convergence.png go beside it",
    )
    args = parser.parse_args()
    experiments = {path.name: Experiment.read(path) for path in args.experiments}
    if len(experiments) < len(args.experiments):
        raise InputError("experiments: two have the same name: give folders of different names")
    probes = {name: _probe(experiment.path) for name, experiment in experiments.items()}
    summaries = {name: summarise(experiment) for name, experiment in experiments.items()}
    found = {name: summary.found for name, summary in summaries.items()}
    convergence = {
        name: fine_tuning_curves(experiment, "ssl_mse")["updates"]
        for name, experiment in experiments.items()
    }
    tables = comparison_tables(probes, convergence, found) + join_summaries(summaries).tables
    body = "\n".join(table.markdown() for table in tables) + "\n" + provenance(args.command)
    print(body, end="")
    drawings = {
        "position.png": comparison_figure(probes, found),
        "convergence.png": convergence_drawing(convergence),
    }
    for name, drawing in drawings.items():
        with atomic_file(args.out.with_name(name)) as path:
            drawing.savefig(path, dpi=150, format="png")
    write_results(args.out, args.title, body)


def _probe(experiment: Path) -> dict:
    path = experiment / "position" / "position.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): run position_probe") from error


if __name__ == "__main__":
    run(main)
