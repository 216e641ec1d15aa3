import pytest

from posinv.files import write_whole


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
