"""Print a speech enhancement recipe's results, and write them to a Markdown file."""

from posinv.bin.cli import names, run
from posinv.bin.results_options import publish, results_parser
from posinv.errors import InputError
from posinv.report.enhancement import enhancement_report
from posinv.report.experiment import LABELS
from posinv.report.results import Published


def main() -> None:
    """Run the command."""
    parser = results_parser(
        __doc__,
        "DIR/seed<seed>/<system>/superb/{pr,asr}/best/decode/scores.json and "
        "DIR/seed<seed>/<system>/enhanced/scores.json",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        required=True,
        metavar="SYSTEM[=LABEL]",
        help="rows of the tables, in order; without a label, noisy and enh have ready ones",
    )
    parser.add_argument(
        "--enh_sets",
        type=names,
        required=True,
        help="test sets over which the signal measures are averaged, as one argument: 'A B'",
    )
    args = parser.parse_args()
    systems: dict[str, str] = {}
    for entry in args.systems:
        system, _, label = entry.partition("=")
        if system in systems:
            raise InputError(f"--systems: {system} is named twice: name it once")
        systems[system] = label or LABELS.get(system, system)
    published = Published.read(args.published)
    tables = enhancement_report(
        args.expdir, systems, args.sets, args.enh_sets, args.seeds, published, args.qbe_sets
    )
    publish(tables, args)


if __name__ == "__main__":
    run(main)
