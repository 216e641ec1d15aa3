"""Disks that are full or may only be read, and inputs that vanish: one line, nothing truncated."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from run_results import differences, results
from toy_commands import OUTPUTS, tiny_ssl
from toy_recipes import MINI, Recipe, copy_recipes

from posinv.bin.train_sentencepiece import main as train_sentencepiece
from posinv.corpora.noisy import Mixing, mix_noise
from posinv.data.audio import OutputFile, write_audio
from posinv.data.checkpoint import write_checkpoint
from posinv.data.directory import format_data
from posinv.data.files import remove_leftovers, write_atomic
from posinv.data.tables import write_table, write_tsv
from posinv.data.units import save_units_model
from posinv.errors import InputError
from posinv.ssl.load import save_pretrained

RATE = 16000
WHY = "File too large"  # of a limit, which stands in for a full disk
WHAT_TO_DO = "make room or the folder writable, or choose another place"
RNG = np.random.default_rng(0)
NOISE = RNG.uniform(-1, 1, 6000)


@contextmanager
def largest_file(size):
    """Let no file of this process grow beyond ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ------------------------------------------------------------------------------------- files


def write_blocks(path):
    """As enhanced audio is written."""
    with OutputFile(path) as file, soundfile.SoundFile(file, "w", RATE, 1, format="FLAC") as audio:
        for block in np.split(NOISE, 4):
            audio.write(block)


WRITERS = {
    "audio.flac": lambda path: write_audio(path, NOISE, RATE),
    "audio.wav": lambda path: write_audio(path, NOISE, RATE),
    "checkpoint.pth": lambda path: write_checkpoint({"a": torch.ones(700), "b": [1, "c"]}, path),
    "units.npz": lambda path: save_units_model(path, NOISE.reshape(6, 1000)),
    "text": lambda path: write_table(path, {f"utt{i}": "a word" for i in range(99)}),
    "scores.tsv": lambda path: write_tsv(path, ("utt", "per"), [{"utt": "a", "per": 0.5}] * 99),
    "scores.json": lambda path: write_atomic(path, json.dumps([0.5] * 99)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_whole_or_as_it_was(tmp_path, name, tried):
    """Wherever in it the disk is full; libsndfile loses the end of a FLAC file silently."""
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    sizes = {*range(0, len(whole), len(whole) // 40), *range(len(whole) - 8, len(whole))}
    for size in sorted(sizes):
        path.write_bytes(b"as it was")
        with pytest.raises(OSError, match=f"{WHY}: '{path}'"), largest_file(size):
            WRITERS[name](path)
        assert path.read_bytes() == b"as it was"
        assert list(tmp_path.iterdir()) == [path]
    with largest_file(len(whole)):
        WRITERS[name](path)
    assert path.read_bytes() == whole
    tried(
        "a file cut short by a full disk, at each of its parts", "one line; as it was", len(sizes)
    )


def test_output_file_says_what_libsndfile_does_not(tmp_path):
    path = tmp_path / "x.flac"
    write_blocks(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        with pytest.raises((OSError, soundfile.LibsndfileError)), largest_file(size):
            write_blocks(path)
    with largest_file(len(whole)):
        write_blocks(path)
    assert path.read_bytes() == whole


# ----------------------------------------------------------------------------------- folders


FOLDERS = {
    "format_data": lambda corpus, out: format_data(corpus, out, RATE, nj=2),
    "mix_noise": lambda corpus, out: mix_noise(corpus, out, Mixing(["white"], [10.0], 0, "x")),
    "SSL model": lambda corpus, out: save_pretrained(tiny_ssl(), out, normalize=False),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_whole_or_as_it_was(corpus, tmp_path, name, tried):
    out = tmp_path / "out"
    make = FOLDERS[name]
    make(corpus, out)
    whole = tree(out)
    if name == "SSL model":  # no folder is replaced by one
        shutil.rmtree(out)
    before = tree(tmp_path)
    sizes = sorted(len(content) for content in whole.values())
    for size in {0, sizes[0] - 1, sizes[-1] // 2, sizes[-1] - 1}:
        with pytest.raises((OSError, InputError), match=rf"{WHY}.*{out}"), largest_file(size):
            make(corpus, out)
        assert tree(tmp_path) == before
        tried("a folder of files on a full disk", "one line; as it was")
    with largest_file(sizes[-1]):
        make(corpus, out)
    assert tree(out) == whole


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_sentencepiece(tmp_path, monkeypatch):
    text, out = tmp_path / "text", tmp_path / "bpe.model"
    text.write_text("".join(f"utt{i} one two three four\n" for i in range(9)))
    argv = ["x", "--text", str(text), "--size", "14", "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(OSError, match=f"{WHY}: '{out}'"), largest_file(500):
        train_sentencepiece()
    assert list(tmp_path.iterdir()) == [text]


def test_what_a_killed_training_left_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f".{ended.pid}.1epoch.pth", f".{os.getpid()}.x.pth", ".hidden", "1epoch.pth"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f".{os.getpid()}.x.pth",
        ".hidden",
        "1epoch.pth",
    }


# ---------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_command_that_finds_no_room(commands, name, tried):
    make, sizes = OUTPUTS[name]
    out = commands.folder / "out"
    for size in sizes:
        shutil.rmtree(out, ignore_errors=True)
        args = make(commands)
        done = commands.run(*args, size=size)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        line = one_line(done)
        assert line.startswith(f"{args[0]}: error: ") and WHY in line, line
        assert "out" in line and "make room" in line
        cut = whole_files(out)
        again = commands.run(*args)
        assert again.returncode == 0, again.stderr
        if name != "enhanced sets":  # whose parts are whole when they are "done"
            assert cut.items() <= whole_files(out).items()
        tried(f"no room for {name}", "one line; nothing cut short; went on")


def one_line(done):
    """Return the last line of standard error, but for the number of operations."""
    return [line for line in done.stderr.splitlines() if not line.endswith(" operations")][-1]


def whole_files(folder):
    """Return what is there under its final name, but records of the run and caches."""
    records = (".yaml", "checkpoint.pth", "index.0", "layers.0")
    return {name: content for name, content in tree(folder).items() if not name.endswith(records)}


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_that_vanishes(commands, workers, tmp_path, tried):
    """After the lists were made and checked."""
    gone = next((commands.folder / "data").rglob("*.flac"))
    gone.rename(tmp_path / "gone")
    try:
        done = commands.run(*commands.enh_train(f"gone{workers}", num_workers=workers))
    finally:
        shutil.move(tmp_path / "gone", gone)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = one_line(done)
    assert line.startswith("enh_train: error: ") and gone.name in line, line
    assert "restore it, or make the data again" in line
    done = commands.run(*commands.enh_train(f"gone{workers}", num_workers=workers))
    assert done.returncode == 0, done.stderr
    tried("audio that vanishes under a training", "one line; went on")


def test_a_data_loading_process_that_dies(commands, fork_server, tried):
    """It is noticed at once, and said in one line."""
    args = commands.enh_train("killed", num_workers=1, max_epoch=1000)
    process = commands.start(*args)
    deadline = time.monotonic() + 60
    while not grandchildren(fork_server):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    begun = time.monotonic()
    while process.poll() is None:
        for pid in grandchildren(fork_server):  # each epoch has its own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        assert time.monotonic() < begun + 60
    done = subprocess.CompletedProcess(args, process.returncode, *process.communicate())
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = one_line(done)
    assert line.startswith("enh_train: error: DataLoader worker (pid") and "num_workers" in line
    tried("a data-loading process killed", f"one line within {time.monotonic() - begun:.0f} s")


def grandchildren(server):
    """Return the process ids of the processes that forks of the server have started."""
    found = ["pgrep", "--full", f"fork_server.py start {server}"]
    parents = {}
    for pid in subprocess.run(found, capture_output=True, text=True).stdout.split():
        try:
            stat = Path("/proc", pid, "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if stat[0] != "Z":
            parents[int(pid)] = int(stat[1])
    return [pid for pid, parent in parents.items() if parents.get(parent) in parents]


# ----------------------------------------------------------------------------------- recipes


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts an empty disk of so many bytes, or resizes the mounted one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size):
        options = f"{'remount,' * folder.is_mount()}size={size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        return folder

    yield resize
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of a size")
def test_a_recipe_on_a_disk_that_is_full(disk, fork_server, monkeypatch, tried):
    """It fails, is run again with a little more room, nine times, and at last with enough."""
    monkeypatch.setenv("POSINV_FORK_SERVER", str(fork_server))
    large = 2**30
    folder = disk(large)
    recipe = Recipe(folder, "mini/enh1")

    def run(size):
        disk(size)
        return recipe.run(*MINI["enh1"])

    copy_recipes(folder)
    copied = shutil.disk_usage(folder).used
    done = run(large)
    assert done.returncode == 0, done.stderr
    unbroken, needed = results(recipe.dir), shutil.disk_usage(folder).used
    subprocess.run(["umount", "--lazy", folder], check=True)
    disk(large)
    copy_recipes(folder)
    for part in range(1, 10):
        done = run(copied + (needed - copied) * part // 10)
        if done.returncode == 0:  # what did not fit was logs alone, which a run does without
            continue
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        [*_, said] = [line for line in done.stderr.splitlines() if "space" in line]
        assert re.search("(?i)no space (is )?left", said), done.stderr
        tried("a recipe on a disk that is full", "one line; went on; results identical")
    done = run(large)
    assert done.returncode == 0, done.stderr
    assert differences(results(recipe.dir), unbroken) == {}


# ------------------------------------------------------------------------------ only to be read


def test_output_that_may_only_be_read(corpus, tmp_path, command, tried):
    out = tmp_path / "out"
    format_data(corpus, out / "dump", RATE)
    before = tree(out)
    (out).chmod(0o555)
    done = command("format_data", "--src", corpus, "--out", out / "dump", bound=True)
    out.chmod(0o755)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "Permission denied" in line and str(out) in line and WHAT_TO_DO in line
    assert tree(out) == before
    tried("output that may only be read", "one line; as it was")
