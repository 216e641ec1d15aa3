"""Compiled code on torch's own threads.

After each operation, torch's OpenMP threads spin for some milliseconds, so that the next one can
begin at once. Threads of our own would share the cores with them, at half the speed. So compiled
code runs in a parallel region of the OpenMP runtime that torch has loaded: its threads are torch's.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

_RUNTIMES = ("libgomp.so.1", "libiomp5.so", "libomp.so.5", "libomp.so")
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# In a forked process, a parallel region would wait for ever for threads that are not there.
os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp() -> Callable | None:
    """Return GCC's entry to a parallel region, which Intel's and LLVM's runtimes have, too.

    None: torch has loaded none of these runtimes.
    """
    for name in _RUNTIMES:
        try:
            parallel = ctypes.CDLL(name, mode=os.RTLD_NOLOAD).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        parallel.restype = None
        return parallel
    return None


def run(region: int, job: int, threads: int) -> None:
    """Call a compiled function ``void region(void *job)`` in up to so many threads at once.

    As the threads can be fewer, the function must take its tasks from what all threads share.

    Args:
        region: address of the function, which doesn't use Python.
        job: address of its argument.
        threads: how many. With torch's number of threads, no thread has to be started.
    """
    if threads == 1:
        _REGION(region)(job)
    elif (parallel := _openmp()) and not _forked:
        parallel(region, job, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_REGION(region), [job] * threads))
