"""Two runs in one folder: the second refuses and names the first; a dead lock is taken over."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "egs" / "TEMPLATE" / "scripts"
# A run that makes data in its first three stages and works in --expdir in the fourth. It waits in
# the stage whose number is in the file "wait".
RUN = """#!/usr/bin/env bash
set -euo pipefail
. scripts/processes.sh
begin_run "$@"
for file in options stages jobs recipe_locks; do . scripts/$file.sh; done
for name in stage=1 stop_stage=4 skip_stages= skip_train=false skip_eval=false train_nj=2 \\
    expdir=exp dumpdir=dump cmd_backend=local; do opt "${name%=*}" "${name#*=}" ""; done
parse_options "$@"
lock_folders
work() {
    local seconds=0
    [ ! -e wait ] || [ "$(cat wait)" != "$1" ] || seconds=60
    touch "$expdir/at_$1"
    sleep "$seconds"
}
for number in 1 2 3 4; do
    if begin_stage "$number" "a stage"; then
        attend work "$number"
        end_stage
    fi
    [ "$number" != 3 ] || share_data "$dumpdir"
done
"""
WAIT = "wait until it ends, end it, or choose another --expdir"


@pytest.fixture
def recipe(tmp_path, signals):
    """A folder of a recipe, RUN; .start(...) begins a run and waits until it is in a stage."""
    folder = tmp_path / "a recipe"
    shutil.copytree(SCRIPTS, folder / "scripts")
    text = (SCRIPTS / "recipe.sh").read_text()
    functions = [re.search(rf"^{name}\(\) {{.*?^}}", text, re.M | re.S) for name in FUNCTIONS]
    (folder / "scripts/recipe_locks.sh").write_text("\n".join(found[0] for found in functions))
    (folder / "run.sh").write_text(RUN)
    (folder / "run.sh").chmod(0o755)
    runs = []

    def run(*args):
        return subprocess.run(
            ["./run.sh", *args], cwd=folder, capture_output=True, text=True, timeout=60
        )

    def start(*args, stage, expdir="exp"):
        (folder / "wait").write_text(str(stage))
        process = subprocess.Popen(
            ["./run.sh", *args, "--expdir", expdir],
            cwd=folder,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs.append(process)
        wait_for(lambda: (folder / expdir / f"at_{stage}").exists() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        (folder / "wait").unlink()
        return process

    run.start, run.folder = start, folder
    yield run
    for process in runs:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


FUNCTIONS = ("lock_folders", "share_data")


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refusal(done):
    assert done.returncode == 1, done.stdout
    [line] = done.stderr.splitlines()
    return line


def locks(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/.lock*"))


def test_the_second_run_names_the_first(recipe):
    first = recipe.start(stage=4)
    line = refusal(recipe())
    host = os.uname().nodename
    assert re.fullmatch(
        rf"error: exp: in use by another run: process {first.pid} on {re.escape(host)}, since "
        rf"[-\d]+ [\d:]+ UTC: {WAIT}",
        line,
    )
    # Another folder for its results, and the data that is there, which both read.
    assert recipe("--expdir", "other", "--stage", "4").returncode == 0
    assert first.poll() is None
    first.terminate()
    assert first.wait(20) == 143
    assert locks(recipe.folder) == []
    assert recipe().returncode == 0


def test_data_is_not_changed_under_a_run_that_reads_it(recipe):
    first = recipe.start(stage=4)
    line = refusal(recipe("--expdir", "other"))
    assert f"dump: in use by another run: process {first.pid} " in line
    assert "from --stage 4 on" in line and "another --dumpdir" in line
    # data/ is free again, since the first run no longer uses it
    assert recipe("--expdir", "other", "--dumpdir", "other dump").returncode == 0


def test_data_in_the_making_is_not_read(recipe):
    first = recipe.start(stage=2)
    for args in (["--stage", "4"], ["--skip_stages", "1 2 3"]):
        line = refusal(recipe("--expdir", "other", *args))
        assert f"dump: in use by another run: process {first.pid} " in line
        assert line.endswith(": wait until it has done stage 3")
    line = refusal(recipe("--expdir", "other", "--dumpdir", "other dump"))
    assert f"data: in use by another run: process {first.pid} " in line


@pytest.mark.parametrize("trial", range(3))  # they race
def test_many_at_once_and_one_gets_it(recipe, trial):
    (recipe.folder / "wait").write_text("4")
    (recipe.folder / "exp").mkdir()
    place = subprocess.run(
        ["bash", "-c", ". scripts/processes.sh; _place"],
        cwd=recipe.folder,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # The lock of a run that has died is in the way of all.
    dead, next_one = (f"host/999999999/{start}/{place}/2026-01-01 00:00/" for start in "12")
    (recipe.folder / "exp/.lock").symlink_to(dead)
    # And that of one that was killed while it took over.
    claim = dead.replace("/", "_").replace(" ", "_")
    (recipe.folder / f"exp/.lock.after.{claim}").symlink_to(next_one)
    runs = [
        subprocess.Popen(
            ["./run.sh"],
            cwd=recipe.folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    wait_for(lambda: sum(run.poll() is not None for run in runs) == 5, 60)
    [holder] = [run for run in runs if run.poll() is None]
    wait_for((recipe.folder / "exp/at_4").exists)
    holder.terminate()
    assert holder.wait(20) == 143
    assert "process 999999999 on host, which has ended, left a lock" in holder.stdout.read()
    for run in runs:
        error = run.stderr.read()
        assert run is holder or f"process {holder.pid} on" in error, error


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_run_is_taken_over(recipe, whole_group):
    """And what it had started ends; the run itself isn't waited for here, so it stays a zombie."""
    first = recipe.start(stage=4)
    (os.killpg if whole_group else os.kill)(first.pid, signal.SIGKILL)
    wait_for(lambda: Path(f"/proc/{first.pid}/stat").read_text().split()[2] == "Z")
    assert locks(recipe.folder)
    done = recipe()
    assert done.returncode == 0, done.stderr
    assert f"exp: process {first.pid} on " in done.stdout
    assert processes_of(first.pid) == []


def test_the_guard_ends_what_a_killed_run_has_started(recipe):
    first = recipe.start(stage=4)
    wait_for(lambda: processes_of(first.pid))
    first.kill()
    wait_for(lambda: processes_of(first.pid) == [])


def processes_of(pid):
    """Return those that have the mark of a run, but for the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            mark = f"\0POSINV_RUN={os.uname().nodename}/{pid}/"
            if path.name != str(pid) and mark.encode() in (path / "environ").read_bytes():
                found.append(path.name)
        except OSError:
            pass
    return found


def test_a_process_id_that_is_used_again(recipe):
    first = recipe.start(stage=4)
    lock = recipe.folder / "exp/.lock"
    words = str(lock.readlink()).split("/")
    first.terminate()
    first.wait(20)
    words[1], words[2] = str(os.getpid()), "1"
    lock.symlink_to("/".join(words))
    assert f"exp: process {os.getpid()} on " in recipe().stdout


def test_another_host(recipe):
    """Its processes aren't seen, but its lock's time, which the guard renews, is."""
    (recipe.folder / "exp").mkdir()
    lock = recipe.folder / "exp/.lock"
    lock.symlink_to("far/1/2/another place/2026-01-01 00:00/")
    line = refusal(recipe())
    seen = r"\(last seen \d+ s ago; after 300 s it counts as dead\)"
    assert re.search(rf"process 1 on far, since 2026-01-01 00:00 UTC {seen}: {WAIT}", line)
    subprocess.run(["touch", "-h", "-d", "200 seconds ago", lock], check=True)
    refusal(recipe())
    subprocess.run(["touch", "-h", "-d", "301 seconds ago", lock], check=True)
    done = recipe()
    assert done.returncode == 0, done.stderr
    assert "exp: process 1 on far, which has ended, left a lock: taken over" in done.stdout


def test_the_guard_renews_the_lock(recipe):
    recipe.start(stage=4)
    locks = [recipe.folder / "exp/.lock", *recipe.folder.glob("dump/.lock.reader.*")]
    assert len(locks) == 2
    for lock in locks:
        subprocess.run(["touch", "-h", "-d", "1 hour ago", lock], check=True)
    for lock in locks:
        wait_for(lambda lock=lock: time.time() - lock.lstat().st_mtime < 60)


def test_a_dead_reader_is_no_hindrance(recipe):
    first = recipe.start(stage=4)
    first.kill()
    first.wait()
    assert any("reader" in name for name in locks(recipe.folder))
    assert recipe("--expdir", "other").returncode == 0
    assert not any("reader" in name for name in locks(recipe.folder))


def test_a_folder_that_can_only_be_read(recipe):
    assert recipe().returncode == 0
    # Root may write everywhere, so the capability to do so is dropped.
    (recipe.folder / "dump").chmod(0o555)
    command = ["setpriv", "--bounding-set=-dac_override", "./run.sh", "--stage", "4"]
    done = subprocess.run(command, cwd=recipe.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (recipe.folder / "exp").chmod(0o555)
    done = subprocess.run(command, cwd=recipe.folder, capture_output=True, text=True)
    why = "Permission denied: make it writable, or choose another"
    assert refusal(done) == f"error: exp: can't be locked: {why}"
