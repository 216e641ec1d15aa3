"""Make a query-by-example search of queries in documents; their transcripts say what is where."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.search import search_in_transcripts


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--queries", type=Path, required=True, help="folder with wav.scp, text, utt2digest")
    add("--documents", type=Path, required=True, help="likewise, with utt2set")
    add("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    found = search_in_transcripts(args.queries, args.documents, args.out)
    nowhere = sorted(query for query, count in found.items() if not count)
    note = f"; in no document, not counted: {' '.join(nowhere)}" if nowhere else ""
    print(f"{args.out}: {len(found)} queries, {sum(found.values())} relevant pairs{note}")


if __name__ == "__main__":
    run(main)
