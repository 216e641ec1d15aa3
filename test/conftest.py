import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORK_SERVER = ROOT / "egs" / "TEMPLATE" / "scripts" / "fork_server.py"
# As path.sh sets them: the fork server takes no job with others.
FORK_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the further recipes, too")
    parser.addoption("--faults", action="store_true", help="run the long form of test/faults, too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem != "test_kills")  # what takes longest begins first
    for mark, what in (("full", "a further recipe"), ("faults", "long")):
        if not config.getoption(f"--{mark}"):
            skip = pytest.mark.skip(reason=f"{what}: test/run.sh --{mark} runs it")
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(skip)


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--faults"):
        return
    from fault_table import write_fault_table  # imports torch

    reports = {
        outcome: [
            report
            for report in terminalreporter.stats.get(outcome, [])
            if report.nodeid.startswith("test/faults/")
        ]
        for outcome in ("passed", "failed", "error")
    }
    write_fault_table(reports["passed"], [*reports["failed"], *reports["error"]])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real speech beside the repository (FSDD, an AN4 sample)."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real speech: {path} is absent")
    return path


@pytest.fixture(scope="session")
def signals():
    """Let scripts trap Ctrl-C in the background of another script, and SIGHUP under nohup."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory, signals):
    """The folder of a fork server."""
    folder = tmp_path_factory.mktemp("server")
    server = [sys.executable, FORK_SERVER, "start", folder, str(os.getpid())]
    subprocess.run(server, check=True, env={**os.environ, **FORK_ENVIRONMENT})
    return folder


@pytest.fixture(scope="session")
def python(fork_server):
    """The first words of a command that runs a module (``-m``); torch and ESPnet are there."""
    deadline = time.monotonic() + 300
    while not (fork_server / "socket").exists():
        assert time.monotonic() < deadline, (fork_server / "log").read_text()
        time.sleep(0.1)
    variables = [f"{name}={value}" for name, value in FORK_ENVIRONMENT.items()]
    return ["env", *variables, str(fork_server / "bin" / "python3")]
