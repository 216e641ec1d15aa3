"""A function over many jobs, in several processes."""

from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context

from posinv.errors import InputError


def map_parallel[Job, Result](
    function: Callable[[Job], Result], jobs: Iterable[Job], nj: int
) -> Iterator[Result]:
    """``map`` in ``nj`` forked processes, results in order; the first error ends it."""
    if nj < 1:
        raise InputError(f"--nj {nj}: at least 1 process is needed")
    if nj == 1:
        yield from map(function, jobs)
        return
    jobs = list(jobs)
    chunk = min(8, 1 + len(jobs) // (4 * nj))
    with get_context("fork").Pool(nj, _remember, (function,)) as pool:
        yield from pool.imap(_call, jobs, chunk)


# A worker's function. The fork inherits it, so that it isn't pickled for each job.
_function: Callable


def _remember(function: Callable) -> None:
    global _function
    _function = function


def _call(job: object) -> object:
    return _function(job)
