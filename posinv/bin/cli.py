"""What posinv's commands share: how they end, and the options of those that make a corpus."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from posinv.errors import InputError


def run(main: Callable[[], object]) -> None:
    """Call ``main`` and leave the process.

    An :class:`~posinv.errors.InputError` is printed to stderr as one line
    (``<command>: error: ...``), exit status 1; any other exception is a defect and keeps
    its traceback.
    """
    try:
        main()
    except InputError as error:
        command = sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
        message = " ".join(str(error).split())
        print(f"{command}: error: {message}", file=sys.stderr)
        sys.exit(1)


def corpus_parser(
    description: str | None, minutes: float, dev_minutes: float, test_minutes: float
) -> argparse.ArgumentParser:
    """Return the options of a command that writes data directories train, dev and test.

    The defaults given are minutes of speech in each.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("data"), help="parent of the data directories")
    add("--minutes", type=float, default=minutes, help="of training speech, at least")
    add("--dev_minutes", type=float, default=dev_minutes, help="of development speech, at least")
    add("--test_minutes", type=float, default=test_minutes, help="of test speech, at least")
    add("--seed", type=int, default=0, help="of every draw")
    add("--nj", type=int, default=2, help="number of processes")
    return parser
