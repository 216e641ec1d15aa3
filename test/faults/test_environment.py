"""Machines that lack something: posinv works, or says in one line what is missing."""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel

from posinv.bin import measure_collapse
from posinv.corpora.download import download
from posinv.data.audio import write_audio
from posinv.data.device import pick_device
from posinv.data.directory import DataDir, format_data, validate
from posinv.data.tables import read_table
from posinv.errors import InputError

RATE = 16000
CACHES = ("XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR", "XDG_CONFIG_HOME")
WRITE_TEMPORARY = """
import tempfile
from pathlib import Path
from posinv.bin.cli import run

def main():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_bytes(bytes(300_000))
    print("written")

run(main)
"""


def one_line(done):
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    assert "Traceback" not in line
    return line


# ---------------------------------------------------------------------------------- GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_where_one_is_asked_for(tmp_path, monkeypatch):
    assert pick_device(0) == "cpu"
    with pytest.raises(InputError, match=r"--ngpu 1: no GPU here that PyTorch can use"):
        pick_device(1)
    argv = ["x", "--ssl", "s", "--wav_scp", "w", "--out", str(tmp_path / "x"), "--ngpu", "1"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(InputError, match=r"--ngpu 1: no GPU here"):
        measure_collapse.main()


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, torch.AcceleratorError])
def test_cuda_that_fails_to_start(monkeypatch, error):
    """A stand-in for CUDA that fails to initialise, as with a driver that is too old."""

    def fail(*args, **kwargs):
        raise error("CUDA unknown error\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(
        InputError, match=r"--ngpu 2: CUDA does not start here \(CUDA unknown error"
    ) as e:
        pick_device(2)
    assert "\n" not in str(e.value)


# --------------------------------------------------------------------- home and TMPDIR


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o555)
    yield str(folder)
    folder.chmod(0o755)


def test_a_read_only_home(corpus, tmp_path, read_only, command):
    env = dict.fromkeys(CACHES) | {"HOME": read_only}
    out = tmp_path / "dump"
    done = command("format_data", "--src", corpus, "--out", out, env=env, bound=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(Path(read_only).iterdir())


@pytest.mark.faults
def test_libraries_in_a_read_only_home(corpus, tmp_path, read_only, command):
    env = dict.fromkeys(CACHES) | {"HOME": read_only}
    out = tmp_path / "dump"
    format_data(corpus, out, RATE)
    torch.manual_seed(0)
    HubertModel(HubertConfig(**TINY_SSL)).save_pretrained(tmp_path / "ssl")
    options = (
        "--ssl",
        tmp_path / "ssl",
        "--wav_scp",
        out / "wav.scp",
        "--out",
        tmp_path / "x.json",
    )
    done = command("measure_collapse", *options, env=env, bound=True)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads((tmp_path / "x.json").read_text())["frame_distance"] <= 2
    plot = "import matplotlib.pyplot, posinv.report.curves; print('drawn')"
    done = command("", code=plot, env=env, bound=True)
    assert done.stdout == "drawn\n" and "Traceback" not in done.stderr
    assert not list(Path(read_only).iterdir())


@pytest.mark.parametrize("tmpdir", [None, "/no/such/folder"])
def test_tmpdir_that_is_unset_or_not_there(command, tmpdir):
    done = command("", code=WRITE_TEMPORARY, env={"TMPDIR": tmpdir})
    assert (done.stdout, done.stderr) == ("written\n", "")


def test_tmpdir_that_is_full(tmp_path, command):
    """A disk of 64 kB where this user may mount one; files of 64 kB at most elsewhere."""
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        limit = None if mounted else 1 << 16
        done = command("", code=WRITE_TEMPORARY, env={"TMPDIR": str(full)}, file_size=limit)
        line = one_line(done)
        assert str(full) in line and "make room" in line
        assert ("No space left on device" if mounted else "File too large") in line
        assert not list(Path(full).iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", str(full)], check=True)


def test_audio_that_there_is_no_room_for(corpus, tmp_path, command):
    folder = tmp_path / "data"
    data = DataDir.read(corpus)
    write_audio(tmp_path / "long.wav", np.random.default_rng(0).uniform(-1, 1, 100_000), RATE)
    wav = data.wav | {"s1-1": str(tmp_path / "long.wav")}
    DataDir(wav, wav, data.text, data.phn, data.utt2spk).write(folder)
    for out in ("dump", "dump"):
        done = command("format_data", "--src", folder, "--out", tmp_path / out, file_size=50_000)
        line = one_line(done)
        assert "/dump: File too large: make room" in line
        assert not (tmp_path / "dump").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"data", "long.wav"}


# ------------------------------------------------------------------------------- locale


@pytest.fixture
def accented(corpus, tmp_path):
    """A corpus whose ids, words and paths aren't ASCII."""
    data = DataDir.read(corpus)
    folder = tmp_path / "données"
    folder.mkdir()
    write_audio(folder / "é 文.wav", 0.1 * np.sin(np.arange(8000)), RATE)
    wav = {"é-文": str(folder / "é 文.wav")} | data.wav
    text = {"é-文": "été 文"} | data.text
    phn = {"é-文": "E T"} | data.phn
    DataDir(wav, wav, text, phn, {"é-文": "é"} | data.utt2spk).write(folder)
    return folder


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "xx_XX", ""])
def test_locales(accented, tmp_path, command, locale):
    env = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": None, "PYTHONIOENCODING": None}
    out = tmp_path / "öut"
    done = command("format_data", "--src", accented, "--out", out, "--nj", 2, env=env)
    if done.returncode:
        assert "needs UTF-8" in one_line(done) or "set LC_ALL=C.UTF-8" in done.stderr
        return
    assert (done.stderr, str(out) in done.stdout) == ("", True)
    assert read_table(out / "text")["é-文"] == "été 文"
    assert validate(out, RATE) > 30000


def test_a_locale_without_utf_8(accented, tmp_path, command):
    """Python's own switches stand in for a locale such as de_DE.ISO-8859-1, where there is none."""
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ("--src", accented, "--out", tmp_path / "out")
    line = one_line(command("format_data", *options, env=env))
    assert "set LC_ALL=C.UTF-8, or PYTHONUTF8=1" in line and not (tmp_path / "out").exists()
    # path.sh, which all recipes read, sets this
    done = command("format_data", *options, env={**env, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, "")


# -------------------------------------------------------------------------------- clock


def test_a_clock_that_jumps_back(corpus, tmp_path, monkeypatch):
    """Files then are of the future; nothing is made twice, taken for old or lost."""
    source = tmp_path / "x.bin"
    source.write_bytes(b"content")
    checksum = "md5:9a0364b9e99bb480dd25e1f0284c8555"
    assert download(source.as_uri(), tmp_path / "y.bin", checksum)
    format_data(corpus, tmp_path / "dump", RATE)
    before = read_table(tmp_path / "dump" / "utt2digest")
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: an_hour_ago)
    assert not download(source.as_uri(), tmp_path / "y.bin", checksum)
    format_data(corpus, tmp_path / "dump", RATE)
    assert read_table(tmp_path / "dump" / "utt2digest") == before
    later = time.time_ns() + 10**13
    os.utime(tmp_path / "dump" / "wav.scp", ns=(later, later))
    assert format_data(tmp_path / "dump", tmp_path / "again", RATE)[0] > 0
    assert read_table(tmp_path / "again" / "utt2digest") == before
