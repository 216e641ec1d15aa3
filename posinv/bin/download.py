"""Download a file, resuming where an earlier run broke off, and unpack it if it is an archive."""

import logging
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.download import UNPACKED, check_archive_name, download, extract, is_extracted


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--url", required=True, help="https or file address")
    add("--out", type=Path, required=True, help="file to write; kept if it is there and right")
    add(
        "--checksum",
        help="md5:<hex digits>, or sha256:<the first 8 or more>, of the file; or 'unverified'",
    )
    add("--extract", type=Path, help="unpack the file, .tar.gz, .tgz, .tar or .zip, in this folder")
    add(
        "--needed_gb",
        type=float,
        help=f"space for unpacking that must be free, in GB; default {UNPACKED} x the file's size",
    )
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
    if args.extract:
        check_archive_name(args.out)
        if is_extracted(args.out, args.extract):  # the archive may be gone by now
            print(f"{args.extract}: {args.out.name} was unpacked there already")
            return
    new = download(args.url, args.out, args.checksum, args.needed_gb, args.extract)
    print(f"{args.out}: {'downloaded' if new else 'was there already'}")
    if args.extract:
        extract(args.out, args.extract, args.needed_gb)
        print(f"{args.extract}: unpacked {args.out.name}")


if __name__ == "__main__":
    run(main)
