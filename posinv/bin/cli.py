"""How every posinv command ends: an exit status, and one line for an error a user can mend."""

import sys
from collections.abc import Callable

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
