import json
import os
import subprocess
import time

import numpy as np
import pytest
import soundfile


@pytest.fixture(scope="session")
def write_utterances():
    """Write noisy and clean utterances of different lengths: wav.scp, spk1.scp and shape."""

    def write(folder, count):
        rng = np.random.default_rng(0)
        lists = {"wav.scp": "", "spk1.scp": "", "shape": ""}
        lengths = [3000 + 417 * i for i in range(count)]
        for i, length in enumerate(lengths):
            clean = 0.1 * rng.standard_normal(length)
            noisy = clean + 0.05 * rng.standard_normal(length)
            for name, wave in (("spk1", clean), ("wav", noisy)):
                soundfile.write(folder / f"{name}{i}.wav", wave, 16000)
                lists[f"{name}.scp"] += f"utt{i} {folder}/{name}{i}.wav\n"
            lists["shape"] += f"utt{i} {length}\n"
        for name, text in lists.items():
            (folder / name).write_text(text)
        return lengths

    return write


class Ranks:
    """Two processes in a folder that share the work of jobs; ``run_job(options)`` does one.

    Their output goes into log0 and log1: a full pipe would stop a process.
    """

    def __init__(self, folder, python, run_job):
        self.folder, self.python = folder, python
        (folder / "rank.py").write_text(
            "import json, sys, torch\n"
            f"{run_job}\n"
            "for options in json.loads(sys.argv[1]):\n"
            "    run_job(options)\n"
            "    torch.distributed.destroy_process_group()\n"
        )

    def start(self, jobs):
        meeting = f"file://{self.folder}/rendezvous{time.monotonic_ns()}"
        return [self._start(rank, jobs, meeting) for rank in ("0", "1")]

    def _start(self, rank, jobs, meeting):
        gloo = ["--dist_backend", "gloo", "--dist_world_size", "2", "--dist_rank", rank]
        mine = [[*job, *gloo, "--dist_init_method", f"{meeting}.{i}"] for i, job in enumerate(jobs)]
        return subprocess.Popen(
            [*self.python, "-m", "rank", json.dumps(mine)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=(self.folder / f"log{rank}").open("w"),
            stderr=subprocess.STDOUT,
        )

    def said(self, rank):
        return (self.folder / f"log{rank}").read_text()[-3000:]

    def finish(self, processes):
        for rank, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, self.said(rank)


@pytest.fixture(scope="module")
def ranks_of(python):
    """Make Ranks of a folder and the source of ``run_job``."""
    return lambda folder, run_job: Ranks(folder, python, run_job)
