"""Recipes that are killed at random moments go on, and end with what an unbroken run gives.

POSINV_FAULT_SEED draws other moments than 0.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_results import differences, results
from toy_commands import OUTPUTS, tiny_ssl
from toy_recipes import MINI, Recipe, copy_recipes

SEED = int(os.environ.get("POSINV_FAULT_SEED", 0))
# A recipe, and the stages that are killed; stages before them run unbroken.
SHORT_PARTS = [("enh1", 1, 9), ("ssft1", 5, 6)]
LONG_PARTS = [("enh1", 1, 5), ("enh1", 6, 9), ("ssft1", 1, 4), ("ssft1", 5, 7)]
LONG = {
    "enh1": ("--inference_nj", "2"),
    "ssft1": ("--inference_nj", "2", "--pr_lrs", "2e-3 3e-3", "--qbe", "true"),
}
# The short form doesn't pretrain, and kills what ssft1 has of its own.
SHORT = {
    "enh1": ("--ssl_model", "../ssl"),
    "ssft1": ("--ssl_model", "../ssl", "--pr_lrs", "2e-3"),
}
# How a run is ended, and its exit status.
ENDS = {
    "SIGKILL": (os.kill, signal.SIGKILL, -9),
    "SIGKILL of the group": (os.killpg, signal.SIGKILL, -9),
    "SIGTERM": (os.kill, signal.SIGTERM, 143),
    "Ctrl-C": (os.killpg, signal.SIGINT, 130),
}
OUTCOME = "went on; results identical"


class Broken:
    """A recipe whose runs are killed.

    Attributes:
        kills: how many in each of these stages.
        seconds: how long each lasted in an unbroken run, with run.sh's own start.
        unbroken: what that run left, which has been removed.
    """

    def __init__(self, recipe: Recipe, first: int, last: int, faults: bool) -> None:
        self.recipe, self.task = recipe, recipe.dir.name
        self.options = (*MINI[self.task], *(LONG if faults else SHORT)[self.task])
        self.kills = 8 if faults else 1 if first == 1 else 2
        lasted = re.findall(r" stage (\d+): done in (\d+) s$", self.finish(1, last), re.M)
        self.seconds = {
            int(stage): 1.0 + int(seconds)
            for stage, seconds in lasted
            if int(stage) >= first and (faults or stage != "4")
        }
        self.unbroken = results(recipe.dir)
        if first == 1:
            shutil.rmtree(recipe.dir / "data")
            shutil.rmtree(recipe.dir / "dump")
            shutil.rmtree(recipe.dir / "exp")
        else:
            shutil.rmtree(recipe.dir / "exp/seed1")

    def start(self, first: int, last: int) -> subprocess.Popen:
        """Start stages of the recipe."""
        stages = ("--stage", str(first), "--stop_stage", str(last))
        return subprocess.Popen(
            [self.recipe.dir / "run.sh", *self.options, *stages],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, first: int, last: int) -> str:
        """Run stages to their end; return what run.sh says."""
        run = self.start(first, last)
        output, error = run.communicate(timeout=900)
        assert run.returncode == 0, output + error
        return output


def pytest_generate_tests(metafunc):
    if "part" in metafunc.fixturenames:
        parts = LONG_PARTS if metafunc.config.getoption("--faults") else SHORT_PARTS
        metafunc.parametrize("part", parts, ids=lambda part: "{} {}-{}".format(*part))


@pytest.fixture
def broken(part, request, tmp_path, fork_server, signals, monkeypatch):
    task, first, last = part
    monkeypatch.setenv("POSINV_FORK_SERVER", str(fork_server))
    wait_for((fork_server / "socket").exists, 300)
    copy_recipes(tmp_path, max_epoch=2)
    tiny_ssl().save_pretrained(tmp_path / "egs/mini/ssl")
    recipe = Recipe(tmp_path, f"mini/{task}")
    return Broken(recipe, first, last, request.config.getoption("--faults"))


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --------------------------------------------------------------------------------------- kills
def test_each_stage_killed_at_random_moments(broken, tried):
    draw = random.Random(f"{SEED} {broken.task}")
    print(f"moments of {broken.task} drawn by POSINV_FAULT_SEED={SEED}")
    for stage, lasts in broken.seconds.items():
        for _ in range(broken.kills):
            name = draw.choice(list(ENDS))
            after = draw.uniform(0, lasts)
            print(f"stage {stage}, of {lasts:.2f} s: {name} after {after:.2f} s")
            begun = time.monotonic()
            if kill(broken.start(stage, stage), name, after):
                tried(f"{broken.task}, stage {stage}: {' or '.join(ENDS)}", OUTCOME)
            else:  # it had more to keep than to do
                lasts = time.monotonic() - begun
        broken.finish(stage, stage)
    assert differences(results(broken.recipe.dir), broken.unbroken) == {}


@pytest.mark.parametrize("name", ["training", "heads", "enhanced files", "data directory"])
def test_killed_before_a_file_operation(commands, name, request, tried):
    """Such as between the two checkpoint files of an epoch, or before a file gets its name."""
    args = OUTPUTS[name][0](commands)
    shutil.rmtree(commands.folder / "out", ignore_errors=True)
    done = commands.run(*args)
    assert done.returncode == 0, done.stderr
    [count] = re.findall(r"^(\d+) operations$", done.stderr, re.M)
    unbroken = results(commands.folder, ["out"])
    numbers = range(1, int(count) + 1)
    if not request.config.getoption("--faults"):
        numbers = random.Random(f"{SEED} {name}").sample(numbers, 3)
    for number in numbers:
        shutil.rmtree(commands.folder / "out")
        done = commands.run(*args, operation=number)
        assert done.returncode == -9, done.stderr
        done = commands.run(*args)
        assert done.returncode == 0, f"operation {number}:\n{done.stderr}"
        assert differences(results(commands.folder, ["out"]), unbroken) == {}, number
        tried(f"{name}: killed before one of its {count} file operations", OUTCOME)


def kill(run: subprocess.Popen, name: str, after: float) -> bool:
    """End a run after some seconds; False if it had ended by itself."""
    send, number, status = ENDS[name]
    try:
        run.wait(after)
    except subprocess.TimeoutExpired:
        send(run.pid, number)
    else:
        assert run.returncode == 0, run.communicate()
    output, error = run.communicate(timeout=60)
    if run.returncode == 0:
        return False
    # A signal that comes before begin_run has set its traps does what it does to any process.
    assert run.returncode in (status, -number), output + error
    if number != signal.SIGKILL:
        assert left_of(run.pid) == []
    return True


def left_of(pid: int) -> list[str]:
    """Return the processes that a run has started and left."""
    mark, found = f"\0POSINV_RUN={os.uname().nodename}/{pid}/".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in b"\0" + (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            pass
    return found
