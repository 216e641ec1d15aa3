import pytest

from posinv.data.files import new_directory, write_whole
from posinv.errors import InputError


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a folder" / "file.txt"
    write_whole(path, "first\n")
    write_whole(path, "ß\n")
    assert path.read_bytes() == "ß\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_new_directory_appears_whole(tmp_path):
    out = tmp_path / "parent" / "a folder"
    with new_directory(out) as fresh:
        (fresh / "x").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["x"]
    assert list(out.parent.iterdir()) == [out]


def test_new_directory_takes_the_place_of_an_empty_one_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError), new_directory(out) as fresh:
        (fresh / "x").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())
    with new_directory(out) as fresh:
        (fresh / "x").touch()
    for taken in (out, out / "x"):
        with pytest.raises(InputError, match=r"exists already"), new_directory(taken):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]
