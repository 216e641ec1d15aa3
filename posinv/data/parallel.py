"""A function over many jobs, in several forked processes.

``concurrent.futures`` is not used: its pool runs threads in the calling process, and a worker that
is forked while one of them holds a lock can deadlock on it. Here, the caller only has pipes.
"""

import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import batched, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from posinv.errors import InputError


def map_parallel[Job, Result](
    function: Callable[[Job], Result], jobs: Iterable[Job], nj: int
) -> Iterator[Result]:
    """``map`` in ``nj`` forked processes, results in order; the first error ends it.

    Where the caller stops early, the processes are killed.

    Raises:
        InputError: ``nj`` below 1, or a process that was killed.
    """
    _check(nj)
    if nj == 1:
        yield from map(function, jobs)
        return
    jobs = list(jobs)
    chunks = batched(jobs, min(8, 1 + len(jobs) // (4 * nj)))
    for results in _map(lambda chunk: [function(job) for job in chunk], chunks, nj, False):
        yield from results


def map_processes[Job, Result](
    function: Callable[[Job], Result], jobs: Iterable[Job], nj: int
) -> Iterator[Result]:
    """Like :func:`map_parallel`, but with a new process for each job.

    A job is taken from ``jobs`` only when a process is free, so ``jobs`` may be endless.
    """
    _check(nj)
    yield from _map(function, jobs, nj, True)


def _check(nj: int) -> None:
    if nj < 1:
        raise InputError(f"--nj {nj}: at least 1 process is needed")


type _Answer = tuple[Any, Exception | None]  # the result, or the error


def _map(function: Callable, jobs: Iterable, nj: int, one_job_each: bool) -> Iterator:
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, int] = {}  # the number of the job
    answers: dict[int, _Answer] = {}
    numbered = enumerate(jobs)
    turn = 0
    try:
        while True:
            ahead = len(busy) + (len(answers) if one_job_each else 0)
            for number, job in islice(numbered, nj - ahead):
                connection = next((idle for idle in processes if idle not in busy), None)
                if connection is None:
                    process, connection = _start(function)
                    processes[connection] = process
                with _saying_that_it_was_killed(nj):
                    connection.send(job)
                busy[connection] = number
            if not busy:
                return
            for connection in cast(list[Connection], wait(busy)):
                with _saying_that_it_was_killed(nj):
                    answers[busy.pop(connection)] = connection.recv()
                if one_job_each:
                    _end(processes.pop(connection), connection)
            while turn in answers:
                result, error = answers.pop(turn)
                turn += 1
                if error is not None:
                    raise error
                yield result
    finally:
        for connection, process in processes.items():
            _end(process, connection)


@contextmanager
def _saying_that_it_was_killed(nj: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise InputError(
            f"one of --nj {nj} processes was killed, often since memory ran out: give fewer, or "
            "make memory free"
        ) from error


def _start(function: Callable) -> tuple[BaseProcess, Connection]:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # else the end of the process would not be seen
    return process, ours


def _end(process: BaseProcess, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


_PR_SET_PDEATHSIG = 1


def _work(function: Callable, connection: Connection, parent: int) -> None:
    # Killed when its parent ends, else it would go on, and write; by Ctrl-C silently.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        connection.send_bytes(_answer(function, connection.recv()))


def _answer(function: Callable, job: Any) -> bytes:
    """Return a pickled _Answer."""
    try:
        return pickle.dumps((function(job), None))
    except Exception as error:
        error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
        return pickle.dumps((None, error))
