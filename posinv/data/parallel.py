"""A function over many jobs, in several processes."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from posinv.errors import InputError


def map_parallel[Job, Result](
    function: Callable[[Job], Result], jobs: Iterable[Job], nj: int
) -> Iterator[Result]:
    """``map`` in ``nj`` forked processes, results in order; the first error ends it.

    Raises:
        InputError: ``nj`` below 1, or a process that was killed.
    """
    _check(nj)
    if nj == 1:
        yield from map(function, jobs)
        return
    jobs = list(jobs)
    chunk = min(8, 1 + len(jobs) // (4 * nj))
    if not jobs:
        return
    with ProcessPoolExecutor(nj, get_context("fork"), _remember, (function, os.getpid())) as pool:
        try:
            yield from pool.map(_call, jobs, chunksize=chunk)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise _killed(nj) from error
            raise


def _check(nj: int) -> None:
    if nj < 1:
        raise InputError(f"--nj {nj}: at least 1 process is needed")


def _killed(nj: int) -> InputError:
    return InputError(
        f"one of --nj {nj} processes was killed, often since memory ran out: give fewer, or make "
        "memory free"
    )


def map_processes[Job, Result](
    function: Callable[[Job], Result], jobs: Iterable[Job], nj: int
) -> Iterator[Result]:
    """As :func:`map_parallel`, but each job gets a new forked process.

    Jobs are taken only when a process is free. Where the caller stops early, the processes that
    still run are killed.

    Raises:
        InputError: ``nj`` below 1, or a process that was killed.
    """
    _check(nj)
    jobs = iter(jobs)
    running: deque[tuple[BaseProcess, Connection]] = deque()
    try:
        while True:
            running.extend(_start(function, job) for job in islice(jobs, nj - len(running)))
            if not running:
                return
            try:
                result, error = running[0][1].recv()
            except EOFError:
                raise _killed(nj) from None
            _end(*running.popleft())
            if error is not None:
                raise error
            yield result
    finally:
        for process, connection in running:
            process.kill()
            _end(process, connection)


def _start(function: Callable, job: Any) -> tuple[BaseProcess, Connection]:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, job, os.getpid()))
    process.start()
    sender.close()  # else the receiver would not see that the process has ended
    return process, receiver


def _send_result(sender: Connection, function: Callable, job: Any, parent: int) -> None:
    _end_with(parent)
    answer: tuple[Any, Exception | None]
    try:
        answer = (function(job), None)
    except Exception as error:
        answer = (None, error)
    sender.send(answer)


def _end(process: BaseProcess, connection: Connection) -> None:
    process.join()
    connection.close()


_PR_SET_PDEATHSIG = 1
# A worker's function. The fork inherits it, so that it isn't pickled for each job.
_function: Callable


def _remember(function: Callable, parent: int) -> None:
    global _function
    _function = function
    _end_with(parent)


def _end_with(parent: int) -> None:
    """Let this process be killed when its parent ends; else it would go on, and write."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _call(job: Any) -> Any:
    return _function(job)
