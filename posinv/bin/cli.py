"""What posinv's commands share: how they end, and the options that several take."""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from posinv.data.files import BAD_PLACE
from posinv.errors import InputError


def run(main: Callable[[], object]) -> None:
    """Call ``main`` and leave the process.

    An :class:`~posinv.errors.InputError` is printed to stderr as one line
    (``<command>: error: ...``), exit status 1; any other exception is a defect and keeps
    its traceback. SIGTERM (``timeout``, SLURM's time limit) removes temporary files, too.
    """
    _exit_on_sigterm()
    try:
        if sys.getfilesystemencoding() != "utf-8":
            raise InputError(
                f"the locale's encoding is {sys.getfilesystemencoding()}, in which not every "
                "utterance can be named: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
            )
        main()
    except (InputError, OSError) as error:
        if not isinstance(error, InputError) and error.errno not in BAD_PLACE:
            raise
        command = sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
        print(f"{command}: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: InputError | OSError) -> str:
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    place = error.filename or tempfile.gettempdir()
    return f"{place}: {error.strerror}: make room or the folder writable, or choose another place"


class _TerminatedError(SystemExit):
    """SIGTERM came."""


@cache
def _exit_on_sigterm() -> None:
    """Leave by SystemExit, which cleans up, in this process; let SIGTERM end its forked workers."""

    def leave(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would break off the cleaning up
        raise _TerminatedError(128 + number)

    show = sys.unraisablehook

    def once_more(unraisable: "sys.UnraisableHookArgs") -> None:
        """Send SIGTERM again if Python ignored the exception, as it does in hooks run at a fork."""
        if unraisable.exc_type is not _TerminatedError:
            show(unraisable)
            return
        signal.signal(signal.SIGTERM, leave)
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    sys.unraisablehook = once_more
    signal.signal(signal.SIGTERM, leave)
    # A forked child gets the default action for SIGTERM. A Python handler could miss a signal that
    # arrives while the child is starting, and the parent would then wait for the child forever.
    sigterm = {signal.SIGTERM}

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm)

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, sigterm),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm),
        after_in_child=in_child,
    )


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help has the module docstring ``description`` and the defaults."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def corpus_parser(
    description: str | None, minutes: float, dev_minutes: float, test_minutes: float
) -> argparse.ArgumentParser:
    """Return the options of a command that writes data directories train, dev and test.

    The defaults given are minutes of speech in each.
    """
    parser = command_parser(description)
    add = parser.add_argument
    add("--out", type=Path, default=Path("data"), help="parent of the data directories")
    add("--minutes", type=float, default=minutes, help="of training speech, at least")
    add("--dev_minutes", type=float, default=dev_minutes, help="of development speech, at least")
    add("--test_minutes", type=float, default=test_minutes, help="of test speech, at least")
    add("--seed", type=int, default=0, help="of every draw")
    add("--nj", type=int, default=2, help="number of processes")
    return parser


def names(argument: str) -> list[str]:
    """Split an option's argument, for argparse: at least one name, and none twice."""
    found = argument.split()
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"'{argument}': at least one name, and none twice")
    return found
