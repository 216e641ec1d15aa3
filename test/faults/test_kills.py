"""Recipes that are killed at random moments go on, and end with what an unbroken run gives.

POSINV_FAULT_SEED draws other moments than 0.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy_recipes import Recipe, copy_recipes

SEED = int(os.environ.get("POSINV_FAULT_SEED", 0))
DATA = ("--local_data_opts", "--minutes 0.4 --dev_minutes 0.1 --test_minutes 0.1")
TASKS = {
    "enh1": ("--criteria", "ssl_mse", "--test_conditions", "clean seen"),
    "ssft1": ("--methods", "mse", "--pr_lrs", "2e-3 3e-3", "--qbe", "true"),
}
OPTIONS = (*DATA, "--token_sets", "train dev test", "--ssl_units", "10", "--inference_nj", "2")
STAGES = {"enh1": 9, "ssft1": 7}
# How a run is ended, and its exit status.
ENDS = {
    "SIGKILL": (os.kill, signal.SIGKILL, -9),
    "SIGKILL of the group": (os.killpg, signal.SIGKILL, -9),
    "SIGTERM": (os.kill, signal.SIGTERM, 143),
    "Ctrl-C": (os.killpg, signal.SIGINT, 130),
}
# What tells of a run, not its results: logs, times, records of the command, what shows a training.
TELLS = re.compile(
    r".*\.log|.*/log/.*|stages\.tsv|report\.html|.*/tensorboard/.*|.*\.png|.*/images/.*"
    r"|(.*/)?\.lock.*"
)


@pytest.fixture(scope="module", params=list(TASKS))
def broken(request, tmp_path_factory, fork_server, ctrl_c):
    """A recipe with what its unbroken run left, which is taken away, and how long a stage took."""
    top = tmp_path_factory.mktemp("kills")
    copy_recipes(top, max_epoch=2)
    recipe = Recipe(top, f"mini/{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSINV_FORK_SERVER", str(fork_server))
        wait_for((fork_server / "socket").exists, 300)
        seconds = []
        for stage in range(1, STAGES[request.param] + 1):
            begun = time.monotonic()
            done = start(recipe, stage)
            output, error = done.communicate(timeout=300)
            assert done.returncode == 0, output + error
            seconds.append(time.monotonic() - begun)
        unbroken = results(recipe.dir)
        for name in ("data", "dump", "exp"):
            shutil.rmtree(recipe.dir / name)
        yield recipe, unbroken, seconds


def start(recipe: Recipe, stage: int) -> subprocess.Popen:
    """Start one stage of the recipe."""
    options = (*OPTIONS, *TASKS[recipe.dir.name], "--stage", stage, "--stop_stage", stage)
    return subprocess.Popen(
        [recipe.dir / "run.sh", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------ what is compared
def results(folder: Path) -> dict[str, str]:
    """Return a digest of each file that a run leaves, by its path."""
    return {
        str(path.relative_to(folder)): digest(path)
        for name in ("data", "dump", "exp")
        for path in (folder / name).rglob("*")
        if path.is_symlink() or path.is_file()
        if not TELLS.fullmatch(str(path.relative_to(folder)))
    }


def digest(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True, map_location="cpu")
        if "checkpoint" in path.name:
            state = [state[name] for name in ("model", "optimizers", "schedulers")]
        content = b"".join(plain(state))
    elif path.name == "RESULTS.md":
        rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
        content = "\n".join(rows).encode()
    elif path.name == "config.yaml":
        content = re.sub(rb"(?m)^(resume|ngpu): .*$", b"", path.read_bytes())
    else:
        content = path.read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def plain(state: object) -> Iterator[bytes]:
    """Yield what a checkpoint holds."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield repr(key).encode()
            yield from plain(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from plain(value)
    elif isinstance(state, torch.Tensor):
        yield state.numpy().tobytes()
    else:
        yield repr(state).encode()


# --------------------------------------------------------------------------------------- kills
def test_each_stage_killed_at_random_moments(broken, request, tried):
    recipe, unbroken, seconds = broken
    kills = 7 if request.config.getoption("--faults") else 1
    draw = random.Random(f"{SEED} {recipe.dir.name}")
    print(f"moments of {recipe.dir.name} drawn by POSINV_FAULT_SEED={SEED}")
    for stage, lasts in enumerate(seconds, 1):
        for _ in range(kills):
            name = draw.choice(list(ENDS))
            after = draw.uniform(0, lasts)
            how = f"stage {stage}, which takes {lasts:.2f} s, {name} after {after:.2f} s"
            print(how)
            if kill(start(recipe, stage), name, after):
                tried(f"`{recipe.dir.name}`, stage {stage}: {name}", "went on; results identical")
        done = start(recipe, stage)
        output, error = done.communicate(timeout=300)
        assert done.returncode == 0, how + "\n" + output + error
    assert differences(results(recipe.dir), unbroken) == {}


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
    assert run.returncode == status, output + error
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


def differences(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple]:
    return {
        name: (ours.get(name), theirs.get(name))
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    }
