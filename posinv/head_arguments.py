"""The arguments of ``heads_train``, split by head, without importing ESPnet."""

from collections.abc import Sequence

from posinv.errors import InputError


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split arguments at ``--head DIR`` and ``--all``.

    Returns:
        The options of all heads, before the first ``--head`` and after ``--all``; those of each
        head, by its directory.

    Raises:
        InputError: a directory is missing, or is there twice.
    """
    common: list[str] = []
    heads: dict[str, list[str]] = {}
    options, words = common, iter(arguments)
    for word in words:
        if word == "--all":
            options = common
        elif word == "--head":
            directory = next(words, "")
            if not directory or directory.startswith("--"):
                raise InputError("--head: needs the directory of a head")
            if directory in heads:
                raise InputError(f"--head {directory}: twice: each head needs its own directory")
            options = heads.setdefault(directory, [])
        else:
            options.append(word)
    return common, heads
