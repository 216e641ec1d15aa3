"""The functions that recipes share (egs/TEMPLATE/lib.sh)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parents[2] / "egs" / "TEMPLATE" / "lib.sh"
OPTIONS = """
opt stage 1 "first stage"
opt stop_stage 100 "last stage"
opt skip_stages "" "stages to skip"
opt ngpu 0 "GPUs"
opt expdir exp "results"
opt name "a b" "a name with spaces"
parse_options "$@"
"""


@pytest.fixture
def bash(tmp_path):
    """Run a script that sources lib.sh, in a folder of its own that has a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "path.sh").write_text(
        f"export PATH='{Path(sys.executable).parent}':$PATH PYTHONPATH='{LIB.parents[2]}'\n"
    )

    def run(script, *args):
        text = f"set -euo pipefail\n. '{LIB}'\n{OPTIONS}\n{script}"
        return subprocess.run(
            ["bash", "-c", text, "recipe", *args], cwd=folder, text=True, capture_output=True
        )

    run.folder = folder
    return run


def test_options_later_ones_win(bash):
    done = bash('echo "$stage/$name"', "--stage", "2", "--name", "c  d", "--stage", "3")
    assert done.stdout == "3/c  d\n"


def test_options_from_yaml(bash):
    (bash.folder / "my options.yaml").write_text("name: [x, y z]\nngpu: 2\n")
    done = bash('echo "$name/$ngpu"', "--ngpu", "1", "--config", "my options.yaml")
    assert done.stdout == "x y z/2\n", done.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["--nam", "x"], "recipe: unknown option --nam; --help lists the options"),
        (["name"], "unexpected argument: name"),
        (["--name"], "option --name needs a value"),
        (["--config", "none.yaml"], "--config none.yaml: No such file or directory"),
    ],
)
def test_bad_options(bash, args, message):
    done = bash("echo reached", *args)
    assert done.returncode != 0
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("nam: 1", "unknown option --nam"),
        ("name: {a: 1}", "name: must be a value or a list"),
        ("- name", "must be a mapping of option names"),
        ("name: [", "not valid YAML"),
    ],
)
def test_bad_yaml_options(bash, text, message):
    (bash.folder / "o.yaml").write_text(text)
    done = bash("echo reached", "--config", "o.yaml")
    assert done.returncode != 0
    assert message in done.stderr


def test_help_prints_each_option_with_its_default(bash):
    done = bash("echo reached", "--stage", "4", "--help")
    assert done.returncode == 0
    assert "reached" not in done.stdout
    for line in (
        "--stage ",
        "first stage (default: 4)",
        "--skip_stages ",
        "(default: none)",
        "--config",
    ):
        assert line in done.stdout


STAGES = """
one() { echo did one; }
two() { echo did two; }
three() { false; echo went on; }
run_stage 1 "first" one
run_stage 2 "second" two
"""


def test_stages(bash):
    assert "did one" in bash(STAGES).stdout
    assert "did one" not in bash(STAGES, "--stage", "2").stdout
    assert "did two" not in bash(STAGES, "--stop_stage", "1").stdout
    skipped = bash(STAGES, "--skip_stages", "1 3").stdout
    assert "stage 1: first: skipped (--skip_stages)" in skipped
    assert "did two" in skipped


def test_a_stage_sees_the_options(bash):
    script = "opt title mine ''; opt number many ''; parse_options --title ours\n"
    script += 'show() { echo "$title $number"; }\nrun_stage 1 "a title" show'
    assert "ours many" in bash(script).stdout


def test_a_failing_stage_stops_the_recipe(bash):
    done = bash(STAGES + 'run_stage 3 "third" three; echo afterwards')
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert "afterwards" not in done.stdout


def test_run_logged_names_the_log_and_the_cause(bash):
    done = bash(
        "run_logged 'a log/x.log' bash -c 'echo \"tool: error: bad thing\"; exit 3'; echo on"
    )
    assert done.returncode != 0
    assert "log: a log/x.log" in done.stderr
    assert "tool: error: bad thing" in done.stderr
    assert "on" not in done.stdout


def test_jobs_run_together_and_one_failure_fails_all(bash):
    script = """
    set_max_jobs 2
    job() { sleep "$1"; echo "$1" >> done; [ "$1" != 0.2 ]; }
    queue job 1; queue job 0.2; queue job 0.1
    wait_jobs
    echo on
    """
    done = bash(script)
    assert done.returncode != 0
    assert "1 of the jobs failed" in done.stderr
    assert "on" not in done.stdout
    assert sorted((bash.folder / "done").read_text().split()) == ["0.1", "0.2", "1"]
    assert bash(script.replace("!= 0.2", "!= none")).returncode == 0


def test_jobs_are_counted_however_many_and_however_they_end(bash):
    """Bash itself forgets how old jobs ended; a killed job is a failed one."""
    script = """
    set_max_jobs 20
    for i in $(seq 60); do queue true; done
    queue bash -c 'kill -9 $PPID'
    wait_jobs
    """
    assert "1 of the jobs failed" in bash(script).stderr
    assert bash("wait_jobs; echo on").stdout == "on\n"


TRAIN = """
echo "$name" > input
train exp/x input -- bash -c 'echo run >> runs; [ ! -e broken ]' _
"""


def test_train_once(bash):
    runs = bash.folder / "runs"
    assert bash(TRAIN).returncode == 0
    record = (bash.folder / "exp/x/run.sh").read_text()
    assert "input" in record
    again = bash(TRAIN)
    assert "finished already" in again.stdout
    assert runs.read_text() == "run\n"
    # Another number of GPUs is no other training; other inputs are.
    assert bash(TRAIN, "--ngpu", "1").returncode == 0
    other = bash(TRAIN, "--name", "other")
    assert other.returncode != 0
    assert "made by another command or from other inputs" in other.stderr
    assert runs.read_text() == "run\n"


def test_train_resumes_after_a_failure(bash):
    (bash.folder / "broken").touch()
    assert bash(TRAIN).returncode != 0
    (bash.folder / "broken").unlink()
    again = bash(TRAIN)
    assert again.returncode == 0
    assert "exp/x: resuming" in again.stdout
    assert (bash.folder / "runs").read_text() == "run\nrun\n"
    assert len(list((bash.folder / "exp/x").glob("train*.log"))) == 2


def test_train_wants_its_inputs(bash):
    done = bash("train exp/x 'no file' -- true")
    assert done.returncode != 0
    assert "no file" in done.stderr
    assert not (bash.folder / "exp/x/run.sh").exists()


def test_ctrl_c_ends_the_jobs(bash):
    script = f"set -euo pipefail\n. '{LIB}'\n{OPTIONS}\nqueue run_logged x.log sleep 71; wait_jobs"
    process = subprocess.Popen(["bash", "-c", script], cwd=bash.folder, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (bash.folder / "x.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    # Not those in state Z: they have ended, and wait for an init process that reaps them.
    alive = ["pgrep", "--runstates", "D,R,S,T", "--session", str(process.pid)]
    while (listing := subprocess.run(alive, capture_output=True, text=True).stdout) != "":
        assert time.monotonic() < deadline + 20, listing
        time.sleep(0.1)
