"""The fork server: a fork is to its caller as a Python of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "egs" / "TEMPLATE" / "scripts" / "fork_server.py"


@pytest.fixture(scope="session")
def python(fork_server):
    """The command that stands for python3, when the server is ready."""
    wait_for(lambda: (fork_server / "socket").exists(), 120)
    return fork_server / "bin" / "python3"


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Make a module of a text, where ``-m`` finds it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.chdir(tmp_path)

    def make(text):
        (tmp_path / "some_module.py").write_text(text)
        return "some_module"

    return make


TELL = """
import json, os, sys, torch
assert sys.stdin.read() == "in put"
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("OURS"), os.environ.get("THEIRS"),
                  torch.get_num_threads(), os.getppid(), __name__, sys.path[0]]))
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_a_fork_is_a_python_of_its_own(python, module, tmp_path, monkeypatch):
    name = module(TELL)
    monkeypatch.setenv("OURS", "a b")
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    parents, told = [], []
    for command in (python, sys.executable):
        done = subprocess.run(
            [command, "-m", name, "7", "x  y"],
            **{"input": "in put", "capture_output": True, "text": True},
        )
        assert done.returncode == 7
        assert done.stderr == "to stderr\n"
        *facts, parent, main, path = eval(done.stdout.replace("null", "None"))
        parents.append(parent)
        told.append((facts, main, path))
    assert told[0] == told[1]
    assert told[0][0] == [["7", "x  y"], str(tmp_path), "a b", None, os.cpu_count()]
    assert parents[0] != os.getpid() == parents[1]


def test_jobs_of_a_recipe_are_forks(python, tmp_path):
    """After path.sh, as jobs.sh runs them."""
    (tmp_path / "who.py").write_text("import os; print(os.getppid())")
    folder = ROOT / "egs" / "mini" / "enh1"
    script = f'cd "{folder}"; . ./path.sh; cd "{tmp_path}"; "{python}" -m who'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    server = subprocess.run(
        ["pgrep", "--full", f"fork_server.py start {python.parents[1]}"],
        **{"capture_output": True, "text": True},
    )
    assert done.stdout.split()[-1] in server.stdout.split()


@pytest.mark.parametrize(
    "text, status, stderr",
    [
        ("print('only this')", 0, ""),
        ("import sys; sys.exit('a message')", 1, "a message\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(print, 'end', file=sys.stderr)", 0, "end\n"),
        ("int('x')", 1, "ValueError: invalid literal for int() with base 10: 'x'\n"),
    ],
)
def test_ends(python, module, text, status, stderr):
    done = subprocess.run([python, "-m", module(text)], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.endswith(stderr) and bool(done.stderr) == bool(stderr)
    assert done.stdout == ("only this\n" if "only" in text else "")


WAIT = """
import pathlib, signal, sys, time
def end(number, frame):
    pathlib.Path(sys.argv[1], "ended").touch()
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], "begun").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(6)
"""


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 5), (signal.SIGINT, 6), (signal.SIGKILL, -9)]
)
def test_signals(python, module, tmp_path, number, status):
    name = module(WAIT)
    caller = subprocess.Popen([python, "-m", name, tmp_path], start_new_session=True)
    wait_for((tmp_path / "begun").exists)
    forks = ["pgrep", "--session", str(os.getsid(0)), "--full", "fork_server.py start"]
    before = subprocess.run(forks, capture_output=True, text=True).stdout.split()
    os.kill(caller.pid, number)
    assert caller.wait(20) == status
    assert (tmp_path / "ended").exists() == (number == signal.SIGTERM)
    # The fork of a caller that was killed is killed, too.
    wait_for(
        lambda: (
            len(subprocess.run(forks, capture_output=True, text=True).stdout.split()) < len(before)
        )
    )


def test_another_posinv_gets_a_python_of_its_own(python, tmp_path):
    package = tmp_path / "posinv"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hello.py").write_text("print('another')")
    command = [python, "-m", "posinv.hello"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "another\n", done.stderr


def test_another_hub_gets_a_python_of_its_own(python, module, monkeypatch):
    name = module("import huggingface_hub.constants; print(huggingface_hub.constants.HF_HOME)")
    monkeypatch.setenv("HF_HOME", "/another/home")
    done = subprocess.run([python, "-m", name], capture_output=True, text=True)
    assert done.stdout == "/another/home\n", done.stderr


def test_it_ends_with_its_owner(tmp_path):
    """And until it serves, and for other modules, the real Python runs."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    owner = subprocess.Popen(["sleep", "60"])
    server = [
        sys.executable,
        SERVER,
        "start",
        folder,
        str(owner.pid),
    ]
    subprocess.run(server, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for module in ("posinv.bin.score_heads", "json.tool"):
        command = [folder / "bin" / "python3", "-m", module, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.startswith("usage: ")
    owner.kill()
    owner.wait()
    wait_for(lambda: not folder.exists(), 120)


def test_ended_when_the_module_has_ended(python, fork_server, module):
    """The signal ends the fork at once, and nothing of the server's code runs in it."""
    name = module("""
import threading, time
from posinv.bin.cli import run
run(lambda: threading.Thread(target=time.sleep, args=(5,)).start())
print("ended", flush=True)
""")
    caller = subprocess.Popen([python, "-m", name], stdout=subprocess.PIPE, text=True)
    assert caller.stdout.readline() == "ended\n"
    time.sleep(0.5)
    caller.terminate()
    assert caller.wait(3) == -signal.SIGTERM
    assert (fork_server / "socket").exists()


def test_output_that_finds_no_room(python, module):
    """The last output is written when the module has ended."""
    name = module("print('ended')")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([python, "-m", name], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_callers_that_are_killed_or_ended_at_once(python, fork_server, module):
    """At any moment of a fork's beginning; the server stays."""
    name = module("import time; time.sleep(60)")
    for i in range(60):
        caller = subprocess.Popen([python, "-m", name], stderr=subprocess.DEVNULL)
        time.sleep(0.03 + i / 1000)
        caller.send_signal((signal.SIGKILL, signal.SIGTERM)[i % 2])
        caller.wait(20)
    assert (fork_server / "socket").exists()
    done = subprocess.run([python, "-m", module("print('on')")], capture_output=True, text=True)
    assert done.stdout == "on\n"
    server = ["pgrep", "--full", f"fork_server.py start {fork_server}"]
    wait_for(lambda: len(subprocess.run(server, capture_output=True).stdout.split()) == 1)
