"""Where jobs run (egs/TEMPLATE/cmd.sh): on this machine and, if asked for, on a real SLURM."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from posinv.report.curves import read_epochs

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "egs" / "TEMPLATE" / "lib.sh"
OPTIONS = """
opt ngpu 0 "GPUs"
opt nj 1 "processes"
opt num_nodes "$num_nodes" "machines"
opt inference_nj 3 "parts"
opt cmd_backend "$cmd_backend" "where jobs run"
opt slurm_conf "$slurm_conf" "SLURM's options"
opt expdir exp "results"
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
def bash(request, tmp_path):
    """Run a script that sources lib.sh, its jobs by one of the back ends."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "list").write_text("".join(f"utt{i} a b  c\n" for i in range(7)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if request.param == "slurm":
        environment |= request.getfixturevalue("slurm")

    def start(script, *args):
        text = f"set -euo pipefail\n. '{LIB}'\npython='{sys.executable}'\n{OPTIONS}\n{script}"
        return subprocess.Popen(
            ["bash", "-c", text, "recipe", "--cmd_backend", request.param, *map(str, args)],
            cwd=folder,
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

    run.start, run.folder, run.backend, run.queue = start, folder, request.param, queue
    return run


def test_job(bash):
    command = """bash -c 'echo "$OURS/$PWD/$2"' _ 1 'b  $c'"""
    done = bash(f'export OURS=1; run_job data "a log%j/x" {command}')
    assert done.returncode == 0, done.stderr
    log = (bash.folder / "a log%j" / "x").read_text().splitlines()
    assert log[1].startswith("# bash -c ")
    assert f"1/{bash.folder}/b  $c" in log[2:]


def test_failed_job_names_its_log_and_the_cause(bash):
    done = bash("run_job train 'a log' bash -c 'echo \"tool: error: bad thing\"; exit 3'; echo on")
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
def parts(bash):
    """Run PARTS, and return what came of it and which parts ran."""
    (bash.folder / "input").write_text("")

    def run(*args):
        runs = bash.folder / "runs"
        runs.unlink(missing_ok=True)
        done = bash(PARTS, *args)
        return done, sorted(runs.read_text().split()) if runs.exists() else []

    run.folder = bash.folder
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


def test_parts_share_gpus_and_processors(bash):
    if bash.backend == "slurm":
        pytest.skip("SLURM hands out GPUs itself")
    script = """
    OMP_NUM_THREADS=6
    run_parts exp list list -- \\
        bash -c 'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS" > exp/part$1/text' _ {job}
    merge_parts exp/part{job}/text exp/text
    cat exp/text
    """
    assert bash(script, "--ngpu", 2).stdout == "1 2\n0 2\n1 2\n"
    (bash.folder / "exp/part.sh").unlink()
    script = "export CUDA_VISIBLE_DEVICES=4,7\n" + script
    assert bash(script, "--ngpu", 2).stdout == "7 2\n4 2\n7 2\n"


def test_ctrl_c_ends_the_jobs_and_parts_resume(bash):
    script = """
    echo > input
    run_parts exp list input -- \\
        bash -c 'echo "$1" >> runs; [ "$1" = 1 ] || [ -e fast ] || sleep 71' _ {job}
    """
    process = bash.start(f"job() {{ {script} }}; queue job; wait_jobs")
    runs, done = bash.folder / "runs", bash.folder / "exp/part1/done"
    deadline = time.monotonic() + 60
    while not (done.exists() and len(runs.read_text().split()) == 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    alive = ["pgrep", "--runstates", "D,R,S,T", "--full", "sleep 71"]
    while subprocess.run(alive, capture_output=True).stdout:
        assert time.monotonic() < deadline + 30
        time.sleep(0.1)
    if bash.backend == "slurm":
        while set(bash.queue().split()[1::2]) - {"CG"}:
            assert time.monotonic() < deadline + 30, bash.queue()
            time.sleep(0.1)
    (bash.folder / "fast").touch()
    runs.unlink()
    again = bash(script)
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


def test_training_on_two_machines(bash, corpus, checkout):
    """Machines are nodes of SLURM, or processes: the same figures either way as on one."""
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
    two = bash(script, "--num_nodes", 2)
    assert two.returncode == 0, two.stdout + two.stderr
    log = (bash.folder / "exp 2" / "train.log").read_text()
    assert ":0/2]" in log
    if bash.backend == "slurm":
        return
    assert bash(script).returncode == 0
    one, two = (read_epochs(bash.folder / f"exp {n}")[0]["train"] for n in (1, 2))
    for name in ("loss", "acc", "grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)


def test_failing_rank_is_told_of(bash, corpus, checkout):
    script = f"""
    train exp list -- "$python" -m posinv.bin.pretrain_train --num_units 5 \\
        --config '{checkout}/conf/small/ssl.yaml' --ssl_conf hidden_sise=8
    """
    done = bash(script, "--num_nodes", 2)
    assert done.returncode != 0
    assert "log: exp/train.log" in done.stderr
    assert (
        "pretrain_train: error: ssl_conf: HuBERT's configuration has no 'hidden_sise'"
        in done.stderr
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["--cmd_backend", "pbs"], "--cmd_backend pbs: must be local or slurm"),
        (["--cmd_backend", "local", "--num_nodes", "2", "--ngpu", "1"], "need --cmd_backend slurm"),
        pytest.param(
            ["--cmd_backend", "slurm"],
            "there is no sbatch on this machine",
            marks=pytest.mark.skipif(bool(shutil.which("sbatch")), reason="sbatch is there"),
        ),
    ],
)
def test_bad_back_end(tmp_path, args, message):
    text = f"set -euo pipefail\n. '{LIB}'\n{OPTIONS}"
    done = subprocess.run(
        ["bash", "-c", text, "recipe", *args], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode != 0
    assert message in done.stderr
