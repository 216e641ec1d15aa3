"""A fork server: posinv's commands start without importing torch, transformers and ESPnet anew.

Importing them takes 10 to 20 s of CPU, and a recipe runs some 90 commands. The server imports them
once. ``FOLDER/bin/python3`` stands for ``python3``: for ``-m MODULE`` it asks the server to fork,
and to run the module in the fork with the caller's folder, environment, input and output; it passes
signals on and ends as the fork does. While the server is not ready, and for anything else, it
becomes the real Python. Only for jobs without a GPU: CUDA does not survive a fork. ::

    fork_server.py start FOLDER OWNER   # serve until the process OWNER ends; then remove FOLDER
    fork_server.py run FOLDER -m posinv.bin.score_heads ...   # what FOLDER/bin/python3 does
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# What takes long to import in the commands of a recipe, and starts no thread.
MODULES = (
    "torch",
    "transformers",
    "espnet2.tasks.enh",
    "espnet2.bin.enh_inference",
    "posinv.espnet.heads",
    "posinv.espnet.tasks.enh",
    "posinv.espnet.tasks.pretrain",
    "posinv.espnet.tasks.ssft",
    "posinv.espnet.tensorboard",
    "posinv.inference.export",
    "posinv.scoring.enhancement",
    "posinv.scoring.text",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS = 0.02  # between two looks at the forks


# ------------------------------------------------------------------------------------ the caller
def run(folder: Path, arguments: list[str]) -> NoReturn:
    """Stand for ``python3 ARGUMENTS``."""
    match arguments:
        case ["-m", module, *rest]:
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(folder / "socket"))
            except OSError:
                pass  # no server, or none yet
            else:
                _run_in_fork(server, module, rest)
    os.execv(sys.executable, [sys.executable, *arguments])


def _run_in_fork(server: socket.socket, module: str, arguments: list[str]) -> None:
    """Return if the server refuses; else end as the fork does."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    job = {
        "module": module,
        "arguments": arguments,
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "ignored": ignored,
    }
    message = json.dumps(job).encode()
    socket.send_fds(server, [struct.pack("Q", len(message))], [0, 1, 2])
    server.sendall(message)
    answers = server.makefile()
    fork = int(answers.readline() or 0)
    if not fork:
        return
    for number in SIGNALS:
        if number not in ignored:
            signal.signal(number, lambda number, frame: _send_signal(fork, number))
    answer = answers.readline()
    if not answer:
        _send_signal(fork, signal.SIGTERM)
        sys.exit("error: the fork server has ended")
    status = int(answer)
    if status < 0:
        with suppress(OSError):  # SIGKILL has no other action
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


# ------------------------------------------------------------------------------------ the server
def start(folder: Path, owner: int) -> None:
    """Start a server in the background."""
    (folder / "bin").mkdir()
    stand_in = folder / "bin" / "python3"
    command = shlex.join([sys.executable, "-IS", str(Path(__file__).resolve()), "run", str(folder)])
    stand_in.write_text(f'#!/usr/bin/env bash\nexec {command} "$@"\n')
    stand_in.chmod(0o700)
    if os.fork():
        return
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: sys.exit())
    os.setpgid(0, 0)  # so that a Ctrl-C doesn't end it before its forks
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    for target, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(descriptor, target)
    os.environ["OMP_NUM_THREADS"] = "1"  # no threads: they would not survive a fork
    with suppress(SystemExit):
        _serve(folder / "socket", owner)
    shutil.rmtree(folder)


def _serve(path: Path, owner: int) -> None:
    for module in MODULES:
        if not _is_alive(owner):
            return
        importlib.import_module(module)
    gc.freeze()
    callers: dict[int, socket.socket] = {}  # by fork
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(SECONDS)
        while callers or _is_alive(owner):
            with suppress(TimeoutError):
                caller = listener.accept()[0]
                caller.settimeout(None)
                job, descriptors = _receive(caller)
                # A fork must not end by the server's handlers: it would remove the server's folder.
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                if not _is_ours(job):
                    caller.close()
                elif fork := os.fork():
                    callers[fork] = caller
                    _tell(caller, fork)
                    caller.setblocking(False)
                else:
                    for connection in (listener, caller, *callers.values()):
                        connection.close()
                    _run(job, descriptors)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                for descriptor in descriptors:
                    os.close(descriptor)
            _look_at_forks(callers)


def _receive(caller: socket.socket) -> tuple[dict, list[int]]:
    """Return a job, and descriptors of its input and output."""
    descriptors: list[int] = []
    try:
        head, descriptors, _, _ = socket.recv_fds(caller, 8, 3)
        message = caller.makefile("rb").read(*struct.unpack("Q", head))
        return json.loads(message), descriptors
    except (OSError, struct.error, ValueError):
        return {}, descriptors  # the caller has been killed


def _is_ours(job: dict) -> bool:
    """Tell whether what the job would import is what is imported here."""
    if not job:
        return False
    environment = job["environment"]
    paths = [job["folder"], *environment.get("PYTHONPATH", "").split(os.pathsep)]
    found = [package for path in paths if (package := Path(path, "posinv")).is_dir()]
    same = bool(found) and found[0].samefile(sys.modules["posinv"].__path__[0])
    return same and _read_at_import(environment) == _read_at_import(os.environ)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that transformers and the hub's client read when they are imported."""
    return {name: x for name, x in environment.items() if name.startswith(("HF_", "TRANSFORMERS_"))}


def _look_at_forks(callers: dict[int, socket.socket]) -> None:
    """Tell the callers of forks that have ended; kill the forks whose callers have."""
    for fork, caller in list(callers.items()):
        ended, status = os.waitpid(fork, os.WNOHANG)
        if ended:
            _tell(caller, os.waitstatus_to_exitcode(status))
            caller.close()
            del callers[fork]
            continue
        try:
            waits = caller.recv(1)
        except BlockingIOError:
            continue
        except ConnectionResetError:  # killed before it read what it was told
            waits = b""
        if not waits:
            _send_signal(fork, signal.SIGKILL)


def _tell(caller: socket.socket, number: int) -> None:
    with suppress(OSError):  # the caller has been killed
        caller.sendall(f"{number}\n".encode())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------ a fork of it
def _run(job: dict, descriptors: list[int]) -> NoReturn:
    """Run a module as ``python3 -m`` does, then exit, even if an exception was raised."""
    status = 1
    try:
        of_module = _status_of(_run_module, job, descriptors)
        of_finish = _status_of(_finish)
        status = of_module or of_finish
    finally:
        os._exit(status)


def _status_of(function: Callable[..., None], *arguments: object) -> int:
    """Call a function; return the exit status that it gives a process."""
    try:
        function(*arguments)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, int):
            return status
        print(status, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _run_module(job: dict, descriptors: list[int]) -> None:
    _become(job, descriptors)
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


def _finish() -> None:
    """Do what the interpreter does at its end, but for taking apart all imports in 0.7 s."""
    for number in SIGNALS:  # while it joins threads, Python ignores a handler's exception
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()


def _become(job: dict, descriptors: list[int]) -> None:
    """Take the caller's arguments, folder, environment, input, output and number of threads."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits

    os.setpgid(0, 0)  # a Ctrl-C of the terminal comes from the caller alone
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in job["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.path[0] = job["folder"]
    sys.argv[1:] = job["arguments"]
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    np.random.seed()


if __name__ == "__main__":
    role, folder, *arguments = sys.argv[1:]
    if role == "run":
        run(Path(folder), arguments)
    else:
        start(Path(folder), int(arguments[0]))
