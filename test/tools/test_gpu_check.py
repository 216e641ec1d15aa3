"""tools/gpu_check.sh with a stand-in for Python: which parts run, what is kept, what is resumed."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"
PYTHON = """#!/usr/bin/env bash
case $* in
    "-c import torch") exit ;;
    "-c "*"get_device_name"*) echo nvidia-toy; exit ;;
    "-c "*"find_spec"*) exit 1 ;;
esac
echo "$*" >> "$LOG"
echo "output of $*"
[[ $* != *"$FAIL"* ]]
"""


@pytest.fixture
def check(tmp_path):
    """Run the script; return what it did, and the commands that it called Python with."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def check(*options, fail="nothing", code=0):
        log.write_text("")
        done = subprocess.run(
            [SCRIPT, "--python", python, "--out", tmp_path / "out", *options],
            capture_output=True,
            text=True,
            env={**os.environ, "LOG": str(log), "FAIL": fail},
        )
        assert done.returncode == code, done.stderr
        return done, log.read_text().splitlines()

    return check


def test_every_part_runs_once_and_is_kept(check, tmp_path):
    done, calls = check()
    assert [call.split()[1 if call[0] == "-" else 0] for call in calls] == [
        *("pytest", "tools/bench_softdtw.py"),
        *["tools/bench_ssft.py"] * 4,
    ]
    assert all("--device cuda" in call for call in calls[1:])
    options = [call.split("--model ")[1] for call in calls[2:]]
    assert options == ["hubert", "hubert --bf16", "wavlm", "wavlm --bf16"]
    kept = (tmp_path / "out" / "softdtw.txt").read_text()
    assert kept.startswith("gpu_check.sh softdtw on nvidia-toy, ") and "output of tools/" in kept
    assert "left out: ESPnet is not installed" in (tmp_path / "out" / "enh.txt").read_text()
    done, calls = check()
    assert calls == [] and done.stdout.count("done before") == 7


def test_a_part_that_fails_does_not_stop_the_others_and_runs_again(check, tmp_path):
    done, calls = check("hubert-float32", "wavlm-float32", fail="--model hubert", code=1)
    assert len(calls) == 2 and done.stderr.endswith("gpu_check: error: failed: hubert-float32\n")
    assert not (tmp_path / "out" / "hubert-float32.txt").exists()
    assert (tmp_path / "out" / "hubert-float32.failed.txt").exists()
    done, calls = check("hubert-float32", "wavlm-float32")
    assert len(calls) == 1 and "--model hubert" in calls[0]
    assert not (tmp_path / "out" / "hubert-float32.failed.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "gpu_check: error: no part nothing: parts are tests softdtw"),
        (["--device", "tpu"], "gpu_check: error: --device must be cuda or cpu, got tpu"),
        (["--out"], "gpu_check: error: --out needs a value"),
    ],
)
def test_bad_options_are_one_line(check, options, message):
    done, calls = check(*options, code=1)
    assert not calls and done.stderr.startswith(message) and done.stderr.count("\n") == 1
