import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import check_install
import pytest

SCRIPT = Path(check_install.__file__)


@pytest.fixture
def distribution(tmp_path):
    """An installed package with one file, and its metadata's folder."""
    folder = tmp_path / "some_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (folder / "INSTALLER").write_text("uv\n")
    (folder / "RECORD").write_text("code.py,sha256=x,5\nsome_package-1.0.dist-info/RECORD,,\n")
    (tmp_path / "code.py").write_text("a = 1")
    return folder


def test_damage(distribution):
    found = metadata.Distribution.at(distribution)
    assert check_install.damage(found) is None
    code = distribution.parent / "code.py"
    code.write_text("a")
    assert check_install.damage(found) == "code.py"
    code.unlink()
    assert check_install.damage(found) == "code.py"
    (distribution / "METADATA").unlink()
    assert check_install.damage(found) == "its metadata"


def test_forget_damaged(distribution, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(distribution.parent))
    assert list(check_install.forget_damaged()) == []
    assert list(check_install.packages()) == ["some_package-1.0"]
    (distribution.parent / "code.py").unlink()
    assert list(check_install.packages()) == ["some_package-1.0  damaged: code.py"]
    assert list(check_install.forget_damaged()) == ["some-package"]
    assert list(check_install.packages()) == []


def test_versions_beside_the_tested_ones(distribution, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(distribution.parent))
    monkeypatch.setattr(check_install, "MAIN", ("some-package", "another"))
    tested = {"some-package": "1.0", "another": "2.0"}
    monkeypatch.setattr(check_install, "tested_versions", lambda: tested)
    lines = list(check_install.check_packages())
    assert (check_install.OK, "some-package 1.0, as tested") in lines
    assert (check_install.BAD, "another is not installed: run tools/setup.sh") in lines
    tested["some-package"] = "1.1"
    note = (check_install.NOTE, "some-package 1.0; tested with 1.1")
    assert note in check_install.check_packages()


def test_wrong_soft_dtw_and_failing_checks_are_said(monkeypatch, capsys):
    def broken():
        raise OSError("no such\nlibrary")
        yield

    monkeypatch.setattr(check_install, "agrees", lambda *args: False)
    monkeypatch.setattr(check_install, "CHECKS", (check_install.check_softdtw, broken))
    monkeypatch.setattr("sys.argv", ["check_install.py"])
    monkeypatch.setattr("locale.getencoding", lambda: "UTF-8")
    assert check_install.main() == 1
    output = capsys.readouterr().out
    assert "✗ soft-DTW on the CPU disagrees with the reference" in output
    assert "✗ broken: OSError: no such library: run tools/setup.sh" in output


def test_this_installation():
    """The command in a locale without the character ✓."""
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert done.stdout.isascii()
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok   ", "note ", "BAD  ")) for line in lines)
    for start in ("ok   Python 3.", "ok   soft-DTW on the CPU agrees", "ok   audio files"):
        assert any(line.startswith(start) for line in lines), done.stdout
    assert sum("GB of disk" in line for line in lines) == len(check_install.RECIPES)
    assert done.returncode == any(line.startswith("BAD") for line in lines)
