"""Print the results of a recipe that fine-tunes SSL models, and write them to a Markdown file."""

from pathlib import Path

from posinv.bin.cli import names, run
from posinv.bin.results_options import publish, results_parser
from posinv.report.curves import plot_curves
from posinv.report.results import Published
from posinv.report.ssft import COLLAPSE, read_collapse, ssft_report

CURVES = {"loss": "loss", "alignment": "alignment loss", "regulariser": "regulariser"}


def main() -> None:
    """Run the command."""
    parser = results_parser(__doc__, "DIR/seed<seed>/<system>, as ssft.sh writes them")
    parser.add_argument(
        "--systems", type=names, required=True, help="rows of the table, as one argument: 'A B'"
    )
    parser.add_argument(
        "--curves", type=Path, required=True, help="image to write, with the training curves"
    )
    args = parser.parse_args()
    published = Published.read(args.published)
    tables = ssft_report(args.expdir, args.systems, args.sets, args.seeds, published, args.qbe_sets)
    first = args.expdir / f"seed{args.seeds[0]}"
    plot_curves(
        {
            system: [args.expdir / f"seed{seed}" / system for seed in args.seeds]
            for system in args.systems
            if system != "base"
        },
        CURVES | {f"ssl_{name}": f"SSL features: {title}" for name, (title, _) in COLLAPSE.items()},
        args.curves,
        {
            f"ssl_{name}": value
            for name, value in read_collapse(first / "base" / "collapse.json").items()
        },
    )
    publish(tables, args)


if __name__ == "__main__":
    run(main)
