import io
import sys
import tarfile

import pytest

from posinv.bin import download
from posinv.errors import InputError


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["download", *map(str, args)])
        download.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def mirror(tmp_path):
    source = tmp_path / "mirror" / "corpus.tar.gz"
    source.parent.mkdir()
    with tarfile.open(source, "w:gz") as archive:
        member = tarfile.TarInfo("Corpus/train/a.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    return source


def test_download_and_unpack(run, mirror, tmp_path):
    out, folder = tmp_path / "down loads" / "corpus.tar.gz", tmp_path / "cor pora"
    command = "--url", mirror.as_uri(), "--out", out, "--extract", folder
    assert run(*command) == f"{out}: downloaded\n{folder}: unpacked corpus.tar.gz\n"
    assert (folder / "Corpus" / "train" / "a.txt").read_text() == "hello"
    out.unlink()
    mirror.unlink()
    assert run(*command) == f"{folder}: corpus.tar.gz was unpacked there already\n"


def test_a_file_alone(run, mirror, tmp_path):
    out = tmp_path / "lexicon.txt"
    command = "--url", mirror.as_uri(), "--out", out
    assert run(*command) == f"{out}: downloaded\n"
    mirror.unlink()
    assert run(*command) == f"{out}: was there already\n"


def test_what_cannot_be_unpacked_is_not_downloaded(run, mirror, tmp_path):
    out = tmp_path / "lexicon.txt"
    with pytest.raises(InputError, match=r"lexicon.txt: not a .tar.gz, .tgz, .tar or .zip file"):
        run("--url", mirror.as_uri(), "--out", out, "--extract", tmp_path / "corpora")
    assert not out.exists()
