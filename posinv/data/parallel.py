"""A function over many jobs, in several processes."""

import ctypes
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

from posinv.errors import InputError

_MEMORY = ", often since memory ran out: give fewer --nj, or make memory free"


def map_parallel[Job, Result](
    function: Callable[[Job], Result], jobs: Iterable[Job], nj: int
) -> Iterator[Result]:
    """``map`` in ``nj`` forked processes, results in order; the first error ends it.

    Raises:
        InputError: ``nj`` below 1, or a process that was killed.
    """
    if nj < 1:
        raise InputError(f"--nj {nj}: at least 1 process is needed")
    if nj == 1:
        yield from map(function, jobs)
        return
    jobs = list(jobs)
    chunk = min(8, 1 + len(jobs) // (4 * nj))
    if not jobs:
        return
    with ProcessPoolExecutor(nj, get_context("fork"), _remember, (function,)) as pool:
        try:
            yield from pool.map(_call, jobs, chunksize=chunk)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise InputError(f"one of --nj {nj} processes was killed{_MEMORY}") from error
            raise


def call_in_process[Job, Result](function: Callable[[Job], Result], job: Job) -> Result:
    """Return ``function(job)``, computed in a forked process that ends with it.

    Raises:
        InputError: the process was killed.
    """
    with ProcessPoolExecutor(1, get_context("fork"), _remember, (function,)) as pool:
        try:
            return pool.submit(_call, job).result()
        except BrokenProcessPool as error:
            raise InputError(f"a process of a single job was killed{_MEMORY}") from error


_PR_SET_PDEATHSIG = 1
# A worker's function. The fork inherits it, so that it isn't pickled for each job.
_function: Callable


def _remember(function: Callable) -> None:
    global _function
    _function = function
    # Else it would end its job, and write, after the process that waits for it has been killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _call(job: Any) -> Any:
    return _function(job)
