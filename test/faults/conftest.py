import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fault_table import AREAS
from hypothesis import HealthCheck, settings
from toy_commands import Commands

from posinv.data.audio import write_audio
from posinv.data.directory import DataDir

ROOT = Path(__file__).resolve().parents[2]


def pytest_configure(config):
    for name, examples in (("short", 60), ("faults", 1000)):
        settings.register_profile(
            name, max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck)
        )
    settings.load_profile("faults" if config.getoption("--faults") else "short")


def _bound_by_permissions():
    """Let file permissions count for root, too: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; takes effect at exec


@pytest.fixture(scope="session")
def command():
    """Run a posinv command, whose standard error must be one line if it fails."""

    def run(name, *args, env=None, bound=False, timeout=120, code=None, file_size=None):
        def before():
            if bound:
                _bound_by_permissions()
            if file_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        start = (
            [sys.executable, "-c", code] if code else [sys.executable, "-m", f"posinv.bin.{name}"]
        )
        return subprocess.run(
            [*start, *map(str, args)],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            cwd=ROOT,
            env={k: v for k, v in {**os.environ, **(env or {})}.items() if v is not None},
            preexec_fn=before,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A data directory of four utterances, in a path with a space; audio is its own reference."""
    folder = tmp_path_factory.mktemp("a corpus") / "train"
    folder.mkdir()
    rng = np.random.default_rng(0)
    wav = {}
    for i in range(4):
        path = folder / f"{i}.wav"
        write_audio(path, 0.2 * rng.uniform(-1, 1, 6000 + 500 * i), 16000)
        wav[f"s{i % 2}-{i}"] = str(path)
    utt2spk = {utt: utt.split("-")[0] for utt in wav}
    text, phn = (dict.fromkeys(wav, words) for words in ("one two", "W AH N T UW"))
    DataDir(wav, wav, text, phn, utt2spk).write(folder)
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory, corpus, python):
    """posinv's commands in a folder with what they need."""
    return Commands(tmp_path_factory.mktemp("commands"), python, corpus)


@pytest.fixture
def tried(record_property):
    """Note for the table of --faults what was tried, what came of it, and how often."""

    def note(what, outcome, times=1):
        record_property("tried", (what, outcome, times))

    return note


@pytest.fixture(autouse=True)
def note_random_inputs(request, tried):
    """Note how many inputs hypothesis draws for a test."""
    if getattr(request.function, "is_hypothesis_test", False):
        what = request.function.__name__.removeprefix("test_").replace("_", " ")
        tried(f"random inputs: {what}", AREAS[request.path.stem][1], settings().max_examples)
