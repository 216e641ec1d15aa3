"""Jobs (egs/TEMPLATE/scripts/jobs.sh): on this machine and, if asked for, on a real SLURM."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from posinv.report.curves import read_epochs

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = f"""
for file in options processes records jobs train; do . "$scripts/$file.sh"; done
begin_run "$@"
opt ngpu 0 "GPUs"
opt inference_gpu 0 "whether parts use a GPU"
opt nj 1 "processes"
opt num_nodes 1 "machines"
opt train_nj 2 "jobs at once"
opt inference_nj 3 "parts"
opt cmd_backend local "where jobs run"
opt slurm_conf '{ROOT}/conf/slurm.conf' "SLURM's options"
opt expdir exp "results"
python='{sys.executable}'
parse_options "$@"
check_cmd_backend
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a SLURM of two nodes on this machine."""
    if not os.environ.get("POSINV_TEST_SLURM"):
        pytest.skip("a real SLURM: for root on Debian, with POSINV_TEST_SLURM=1")
    script, folder = ROOT / "tools" / "slurm_single_node.sh", tmp_path_factory.mktemp("s") / "slurm"
    subprocess.run([script, "start", folder], check=True)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([script, "stop", folder], check=True)


@pytest.fixture(params=["local", "slurm"])
def jobs(request, bash):
    """Run a script after the options above, its jobs by one of the back ends."""
    (bash.folder / "list").write_text("".join(f"utt{i} a b  c\n" for i in range(7)))
    # As path.sh sets them, or the fork server would take no job.
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    options = OPTIONS
    if request.param == "slurm":
        environment |= request.getfixturevalue("slurm")
    else:
        options += "python=$POSINV_FORK_SERVER/bin/python3\n"

    def start(script, *args):
        return subprocess.Popen(
            bash.command(options + script, "--cmd_backend", request.param, *args),
            cwd=bash.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(script, *args):
        process = start(script, *args)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def queue():
        names = ["squeue", "--noheader", "--format=%j %t"]
        return subprocess.run(names, env=environment, text=True, capture_output=True).stdout

    run.start, run.folder, run.backend, run.queue = start, bash.folder, request.param, queue
    return run


def test_jobs_run_together_and_one_failure_fails_all(bash):
    script = """
    job() { sleep "$1"; echo "$1 $OMP_NUM_THREADS" >> done; [ "$1" != 0.2 ]; }
    queue job 1; queue job 0.2; queue job 0.1
    wait_jobs
    echo on
    """
    done = bash(OPTIONS + script)
    assert done.returncode != 0
    assert "1 of the jobs failed" in done.stderr
    assert "on" not in done.stdout
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    lines = [f"{seconds} {threads}" for seconds in ("0.1", "0.2", "1")]
    assert sorted((bash.folder / "done").read_text().splitlines()) == lines
    assert bash(OPTIONS + script.replace("!= 0.2", "!= none")).returncode == 0


def test_a_job_after_another(bash):
    script = """
    job() { sleep "$1"; echo "$1" >> done; [ "$1" != "$failing" ]; }
    failing=$2
    _stage_title="stage 1"
    queue job 1; queue job 0.2
    _stage_title="stage 2"
    queue after "job 1" job 0.1; queue after "job never queued" job 0; queue after "job 0.2" job 0.3
    wait_jobs
    echo on
    """

    def run(failing):
        (bash.folder / "done").unlink(missing_ok=True)
        done = bash(OPTIONS + script.replace("$2", failing), "--train_nj", 3)
        return done, (bash.folder / "done").read_text().split()

    done, ended = run("none")
    assert done.stdout == "on\n", done.stderr
    assert ended.index("1") < ended.index("0.1")
    assert ended.index("0.2") < ended.index("0.3")
    assert ended.index("0") < ended.index("1")
    assert len(ended) == 5
    done, ended = run("1")
    assert done.returncode != 0
    assert "0.1" not in ended and len(ended) == 4
    assert "job 0.1: left out, since this failed: job 1" in done.stdout
    assert "error: stage 1, stage 2: 2 of the jobs failed" in done.stderr


def test_the_next_stage_does_not_start_after_a_failure(bash):
    script = """
    job() { echo "$1" >> done; [ "$1" != failing ]; }
    _stage_title="stage 1"
    queue job failing; queue job another
    _stage_title="stage 2"
    queue job next
    echo on
    """
    done = bash(OPTIONS + script, "--train_nj", 1)
    assert done.returncode != 0
    assert "error: stage 1: 1 of the jobs failed" in done.stderr
    assert (bash.folder / "done").read_text().split() == ["failing", "another"]
    assert done.stdout == ""


def test_jobs_are_counted_however_many_and_however_they_end(bash):
    """Bash itself forgets how old jobs ended; a killed job is a failed one."""
    script = """
    for i in $(seq 60); do queue true; done
    queue bash -c 'kill -9 $PPID'
    wait_jobs
    """
    assert "1 of the jobs failed" in bash(OPTIONS + script, "--train_nj", 20).stderr
    assert bash(OPTIONS + "wait_jobs; echo on").stdout == "on\n"


def test_ctrl_c_ends_the_queue(bash):
    command = bash.command(OPTIONS + "queue run_here x.log sleep 71; wait_jobs")
    process = subprocess.Popen(command, cwd=bash.folder, start_new_session=True)
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


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_bash_parses(bash, end):
    """Bash may run a trap in the middle of a $(...), and parse its command as a part of that."""
    script = 'echo begun\nf() { : "${1:-$(:)}"; }\nwhile :; do f x; done'
    for _ in range(10):
        assert_ended(begin(bash, script), end)


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM"])
def test_the_fork_server_leaves_nothing(bash, end):
    """A run that is ended at any moment of the server's beginning."""
    folder = tempfile.TemporaryDirectory(prefix="t")  # the path of a socket must be short
    script = f"""
    ln -sfn "$scripts" scripts
    . ./path.sh
    unset POSINV_FORK_SERVER
    export TMPDIR={folder.name}
    stage=1
    last_stage=2
    echo begun
    use_fork_server
    sleep 70 & wait
    """
    with folder:
        for i in range(10):
            process = begin(bash, script)
            time.sleep(i / 50)
            assert_ended(process, end)
            assert list(Path(folder.name).iterdir()) == []


def begin(bash, script):
    """Start a script in its own process group, and wait until it prints ``begun``."""
    process = subprocess.Popen(
        bash.command(OPTIONS + script),
        cwd=bash.folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


def assert_ended(process, end):
    number = signal.Signals[end]
    send = os.killpg if end == "SIGINT" else os.kill
    send(process.pid, number)
    try:
        error = process.communicate(timeout=20)[1]
    except subprocess.TimeoutExpired:  # bash loses a SIGINT that comes just as a $(...) ends
        send(process.pid, number)
        error = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert error == f"error: ended by {end}; the same command goes on from here\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP", "guard", "next run"])
def test_a_job_ends_with_the_run(jobs, end):
    """After SIGKILL the guard ends it, or the next run that takes the lock over."""
    lock = """
    ln -sfn "$scripts" scripts
    lock exp wait
    """
    guard = "[ -e no_guard ] || start_guard exp\n"
    if end == "next run":
        (jobs.folder / "no_guard").touch()
    process = jobs.start(f"{lock}{guard}run_job data log bash -c 'echo > begun; sleep 72; true'")
    wait_for(lambda: (jobs.folder / "begun").exists() or process.poll() is not None, 60)
    process.send_signal(getattr(signal, end, signal.SIGKILL))
    status = {"SIGTERM": 143, "SIGHUP": 129}.get(end, -9)
    assert process.wait(timeout=60) == status
    if status != -9:
        error = process.stderr.read()
        assert error == f"error: ended by {end}; the same command goes on from here\n"
    assert (jobs.folder / "exp/.lock").is_symlink() == (status == -9)
    if end == "next run":
        done = jobs(f"{lock}echo on")
        assert f"exp: process {process.pid} on " in done.stdout, done.stderr
        assert done.stdout.endswith("\non\n")
    wait_for(lambda: not asleep(72), 30 if end == "guard" else 1)
    if jobs.backend == "slurm":
        wait_for(lambda: jobs.queue() == "", 30 if end == "guard" else 1)


def asleep(seconds):
    """Return the processes that sleep so long, but not those in state Z, which have ended."""
    alive = ["pgrep", "--runstates", "D,R,S,T", "--full", f"sleep {seconds}$"]
    return subprocess.run(alive, capture_output=True).stdout


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_there_is_no_room_for_the_log(bash):
    """What went wrong can't be read there."""
    limit = "trap '' XFSZ; ulimit -f 1\n"  # as if the disk were full
    done = bash(OPTIONS + limit + "run_here log bash -c 'exit 1'")
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "error: a command failed; log: log",
        ".: can't be written, or no space is left: make room, and start the same command again",
    ]


def test_job(jobs):
    command = """bash -c 'echo "$OURS/$PWD/$2"' _ 1 'b  $c'"""
    done = jobs(f'export OURS=1; run_job data "a log%j/x" {command}')
    assert done.returncode == 0, done.stderr
    log = (jobs.folder / "a log%j" / "x").read_text().splitlines()
    assert log[1].startswith("# bash -c ")
    assert f"1/{jobs.folder}/b  $c" in log[2:]


def test_failed_job_names_its_log_and_the_cause(jobs):
    done = jobs("run_job train 'a log' bash -c 'echo \"tool: error: bad thing\"; exit 3'; echo on")
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "error: a command failed; log: a log",
        "tool: error: bad thing",
    ]
    assert done.stdout == ""


# Each part puts its number into "runs" and copies its lines, unless there is a "broken<part>".
PARTS = """
run_parts "exp x" list input -- bash -c 'echo "$1" >> runs
    [ ! -e "broken$1" ] || { echo "tool: error: no $1"; exit 1; }
    cp "exp x/part$1/list" "exp x/part$1/text"' _ {job}
merge_parts "exp x/part{job}/text" "exp x/text"
"""


@pytest.fixture
def parts(jobs):
    """Run PARTS, and return what came of it and which parts ran."""
    (jobs.folder / "input").write_text("")

    def run(*args):
        runs = jobs.folder / "runs"
        runs.unlink(missing_ok=True)
        done = jobs(PARTS, *args)
        return done, sorted(runs.read_text().split()) if runs.exists() else []

    run.folder = jobs.folder
    return run


def test_parts_merge_in_order_and_are_kept(parts):
    text = (parts.folder / "list").read_text()
    done, ran = parts()
    assert done.returncode == 0, done.stderr
    assert ran == ["1", "2", "3"]
    assert (parts.folder / "exp x/text").read_text() == text
    sizes = [
        len((parts.folder / f"exp x/part{i}/list").read_text().splitlines()) for i in (1, 2, 3)
    ]
    assert sizes == [3, 2, 2]
    done, ran = parts()
    assert (done.returncode, ran) == (0, [])
    assert "exp x: 3 of 3 parts done already" in done.stdout
    assert (parts.folder / "exp x/text").read_text() == text
    # Other inputs, another list and another number of parts are other work.
    (parts.folder / "input").write_text("new")
    assert parts()[1] == ["1", "2", "3"]
    (parts.folder / "list").write_text(text.replace("utt0", "utt9"))
    assert parts()[1] == ["1", "2", "3"]
    assert parts("--inference_nj", 9)[1] == ["1", "2", "3", "4", "5", "6", "7"]
    assert (parts.folder / "exp x/text").read_text() == text.replace("utt0", "utt9")


def test_failed_part_is_named_and_done_alone_next_time(parts):
    (parts.folder / "broken2").touch()
    done, ran = parts()
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "error: a command failed; log: exp x/part2/log",
        "tool: error: no 2",
    ]
    assert ran == ["1", "2", "3"]
    assert not (parts.folder / "exp x/text").exists()
    (parts.folder / "broken2").unlink()
    done, ran = parts()
    assert (done.returncode, ran) == (0, ["2"])
    assert "exp x: 2 of 3 parts done already" in done.stdout
    assert (parts.folder / "exp x/text").read_text() == (parts.folder / "list").read_text()


def test_parts_share_gpus_and_processors(jobs):
    if jobs.backend == "slurm":
        pytest.skip("SLURM hands out GPUs itself")
    script = """
    OMP_NUM_THREADS=6
    run_parts exp list list -- \\
        bash -c 'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS" > exp/part$1/text' _ {job}
    merge_parts exp/part{job}/text exp/text
    cat exp/text
    """
    assert jobs(script, "--ngpu", 2).stdout == "1 2\n0 2\n1 2\n"
    (jobs.folder / "exp/part.sh").unlink()
    script = "export CUDA_VISIBLE_DEVICES=4,7\n" + script
    assert jobs(script, "--ngpu", 2).stdout == "7 2\n4 2\n7 2\n"


def test_ctrl_c_ends_the_jobs_and_parts_resume(jobs):
    script = """
    echo > input
    run_parts exp list input -- \\
        bash -c 'echo "$1" >> runs; [ "$1" = 1 ] || [ -e fast ] || sleep 71' _ {job}
    """
    process = jobs.start(f"job() {{ {script} }}; queue job; wait_jobs")
    runs, done = jobs.folder / "runs", jobs.folder / "exp/part1/done"
    deadline = time.monotonic() + 60
    while not (done.exists() and len(runs.read_text().split()) == 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    wait_for(lambda: not asleep(71), 30)
    if jobs.backend == "slurm":
        while set(jobs.queue().split()[1::2]) - {"CG"}:
            assert time.monotonic() < deadline + 30, jobs.queue()
            time.sleep(0.1)
    (jobs.folder / "fast").touch()
    runs.unlink()
    again = jobs(script)
    assert again.returncode == 0, again.stderr
    assert sorted(runs.read_text().split()) == ["2", "3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four utterances with units, for a HuBERT's pretraining."""
    folder = tmp_path_factory.mktemp("corpus")
    lists = dict.fromkeys(("wav.scp", "units", "shape"), "")
    for i in range(4):
        wave = 0.1 * np.random.default_rng(i).standard_normal(6400)
        soundfile.write(folder / f"{i}.wav", wave, 16000)
        lists["wav.scp"] += f"utt{i} {folder}/{i}.wav\n"
        lists["units"] += f"utt{i} {' '.join('01234' * 4)[: 2 * 19 - 1]}\n"
        lists["shape"] += f"utt{i} 6400\n"
    for name, text in lists.items():
        (folder / name).write_text(text)
    return folder


def test_training_on_two_machines(jobs, corpus, checkout):
    """Machines are nodes of SLURM, or processes: the same figures either way as on one machine."""
    config = checkout / "conf" / "small" / "ssl.yaml"
    options = " ".join(
        f"--{part}_data_path_and_name_and_type {corpus}/wav.scp,speech,sound "
        f"--{part}_data_path_and_name_and_type {corpus}/units,units,text_int "
        f"--{part}_shape_file {corpus}/shape"
        for part in ("train", "valid")
    )
    script = f"""
    train "exp $num_nodes" list -- "$python" -m posinv.bin.pretrain_train --config '{config}' \\
        --num_units 5 {options}
    """
    two = jobs(script, "--num_nodes", 2)
    assert two.returncode == 0, two.stdout + two.stderr
    log = (jobs.folder / "exp 2" / "train.log").read_text()
    assert ":0/2]" in log
    assert jobs(script).returncode == 0
    one, two = (read_epochs(jobs.folder / f"exp {n}")[0]["train"] for n in (1, 2))
    for name in ("loss", "acc", "grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)


def test_failing_rank_is_told_of(jobs, corpus, checkout):
    script = f"""
    train exp list -- "$python" -m posinv.bin.pretrain_train --num_units 5 \\
        --config '{checkout}/conf/small/ssl.yaml' --ssl_conf hidden_sise=8
    """
    done = jobs(script, "--num_nodes", 2)
    assert done.returncode != 0
    assert "log: exp/train.log" in done.stderr
    assert (
        "pretrain_train: error: ssl_conf: HuBERT's configuration has no 'hidden_sise'"
        in done.stderr
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["--cmd_backend", "local", "--num_nodes", "2", "--ngpu", "1"], "need --cmd_backend slurm"),
        pytest.param(
            ["--cmd_backend", "slurm"],
            "there is no sbatch on this machine",
            marks=pytest.mark.skipif(bool(shutil.which("sbatch")), reason="sbatch is there"),
        ),
    ],
)
def test_bad_back_end(bash, args, message):
    done = bash(OPTIONS, *args)
    assert done.returncode != 0
    assert message in done.stderr
