import os
import signal
import subprocess
import sys

import pytest

from posinv.data.files import atomic_file, atomic_folder, read_text, write_atomic
from posinv.errors import InputError


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a folder" / "file.txt"
    write_atomic(path, "first\n")
    write_atomic(path, "ß\n")
    assert path.read_bytes() == "ß\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_text_that_is_not_utf_8_is_refused_by_line(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"a one\nb two\nc \xe9t\xe9\n")
    with pytest.raises(InputError, match=r"text: line 3: not UTF-8 text .*iconv"):
        read_text(path)


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_file_keeps_its_suffix_and_may_be_a_link(tmp_path):
    path = tmp_path / "a folder" / "link.txt"
    for target in ("first", "second"):
        with atomic_file(path) as temporary:
            assert temporary.suffix == ".txt" and temporary.parent == path.parent
            temporary.symlink_to(target)
    assert str(path.readlink()) == "second"
    assert list(path.parent.iterdir()) == [path]


def test_an_atomic_folder_appears_whole(tmp_path):
    out = tmp_path / "parent" / "a folder"
    with atomic_folder(out) as fresh:
        (fresh / "x").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["x"]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_nothing(tmp_path, number):
    """SIGTERM cleans up; what SIGKILL left, the next run removes."""
    script = f"""
from posinv.bin.cli import run
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_parallel
import time

def main():
    with atomic_folder({str(tmp_path / "out")!r}) as fresh:
        (fresh / "large").write_text("x")
        print("there", flush=True)
        list(map_parallel(time.sleep, [60, 60], 2))

run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"there\n"
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == (128 + number if number == signal.SIGTERM else -number)
    process.stdout.close()
    assert len(list(tmp_path.iterdir())) == (number == signal.SIGKILL)
    with atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pools_of_a_command_end(tmp_path):
    """Workers are ended at any moment of their start, those that replace others, too."""
    script = """
from multiprocessing import get_context
from posinv.bin.cli import run

def main():
    for _ in range(150):
        with get_context("fork").Pool(3, maxtasksperchild=1) as pool:
            pool.map(abs, range(4), 1)

run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_an_atomic_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError), atomic_folder(out) as fresh:
        (fresh / "x").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())
    with atomic_folder(out) as fresh:
        (fresh / "x").touch()
    for taken in (out, out / "x"):
        with pytest.raises(InputError, match=r"exists already"), atomic_folder(taken):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]
    (out / "wav.scp").touch()
    with atomic_folder(out, replaces="wav.scp") as fresh:
        (fresh / "y").touch()
    with (
        pytest.raises(InputError, match=r"exists already and has no wav\.scp"),
        atomic_folder(out, replaces="wav.scp"),
    ):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "y"]
