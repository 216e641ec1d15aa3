import hashlib
import io
import json
import re
import shutil
import tarfile
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from posinv.corpora import download as module
from posinv.corpora.download import download, extract, is_extracted
from posinv.errors import InputError

CONTENT = np.random.default_rng(3).bytes(1_500_000)
OTHER = np.random.default_rng(4).bytes(1_500_000)
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's attributes say, and keeps the requests' headers."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if self.path != "/corpus.tar.gz":
            self.send_error(404)
            return
        content, start = server.content, 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        current = self.headers.get("If-Range") in (None, *server.validators.values())
        if match and server.ranges and (current or server.ignores_if_range):
            start = int(match[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        for name, value in server.validators.items():
            self.send_header(name, value)
        if server.tells_length:
            self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        stop = server.drops.pop(0) if server.drops else len(content)
        self.wfile.write(content[start:stop])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0.0, 0.01))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.validators = CONTENT, {"ETag": '"1"'}
    server.ranges, server.ignores_if_range, server.tells_length = True, False, True
    server.drops, server.statuses, server.requests = [], [], []
    server.url = f"http://127.0.0.1:{server.server_port}/corpus.tar.gz"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ranges(server):
    return [request.get("Range") for request in server.requests]


def break_off(server, out, at=900_000, **kwargs):
    """Leave a partial file, as a run without success does."""
    server.drops = [at] * 9
    with pytest.raises(InputError, match=f"broken off after {at} of 1500000 bytes: given up"):
        download(server.url, out, **kwargs)
    server.drops = []
    server.requests.clear()
    assert out.with_name("x.tar.gz.partial").stat().st_size == at and not out.exists()


def names(folder):
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("checksum", [None, MD5, SHA256, SHA256[:15]])
def test_plain(server, tmp_path, checksum):
    out = tmp_path / "a folder" / "x.tar.gz"
    assert download(server.url, out, checksum)
    assert out.read_bytes() == CONTENT
    assert ranges(server) == [None]
    assert names(out.parent) == {"x.tar.gz"} | ({"x.tar.gz.ok"} if checksum else set())
    assert not download(server.url, out, checksum)
    assert len(server.requests) == 1


def test_file_address(tmp_path):
    source = tmp_path / "with space.bin"
    source.write_bytes(CONTENT)
    assert download(source.as_uri(), tmp_path / "copy", SHA256)
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(InputError, match=r"nowhere: No such file or directory: correct the addr"):
        download((tmp_path / "nowhere").as_uri(), tmp_path / "other")


def test_a_dropped_connection_is_resumed(server, tmp_path):
    server.drops = [700_000, 700_001, 700_001, 1_100_000]
    assert download(server.url, tmp_path / "x", MD5)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert ranges(server) == [
        None,
        *(f"bytes={n}-" for n in (700_000, 700_001, 700_001, 1_100_000)),
    ]
    assert {request.get("If-Range") for request in server.requests[1:]} == {'"1"'}


@pytest.mark.parametrize(
    "validators", [{"ETag": '"1"'}, {"Last-Modified": "Sat, 21 Feb 2015 09:00:00 GMT"}]
)
def test_a_later_run_resumes(server, tmp_path, validators):
    server.validators = validators | {"ETag": validators.get("ETag", 'W/"weak"')}
    out = tmp_path / "x.tar.gz"
    break_off(server, out)
    assert download(server.url, out, MD5)
    assert out.read_bytes() == CONTENT
    assert ranges(server) == ["bytes=900000-"]
    assert server.requests[0]["If-Range"] in validators.values()
    assert names(tmp_path) == {"x.tar.gz", "x.tar.gz.ok"}


def test_a_whole_partial_file_needs_no_request(server, tmp_path):
    out = tmp_path / "x.tar.gz"
    break_off(server, out)
    with (tmp_path / "x.tar.gz.partial").open("ab") as file:
        file.write(CONTENT[900_000:])
    assert download(server.url, out, MD5)
    assert out.read_bytes() == CONTENT and not server.requests


@pytest.mark.parametrize("how", ["no ranges", "no validator", "another address", "no record"])
def test_what_cannot_be_resumed_starts_again(server, tmp_path, how):
    if how == "no ranges":
        server.ranges = False
    if how == "no validator":
        server.validators = {}
    out = tmp_path / "x.tar.gz"
    break_off(server, out)
    if how == "no record":
        (tmp_path / "x.tar.gz.partial.json").unlink()
    url = server.url.replace("127.0.0.1", "localhost") if how == "another address" else server.url
    assert download(url, out)
    assert out.read_bytes() == CONTENT
    assert ranges(server) == (["bytes=900000-"] if how == "no ranges" else [None])


def test_a_server_without_ranges_ends_after_a_few_attempts(server, tmp_path):
    server.ranges = False
    server.drops = [700_000, 400_000, 600_000]
    with pytest.raises(InputError, match="broken off after 600000 of 1500000 bytes: given up"):
        download(server.url, tmp_path / "x")
    assert len(server.requests) == 3


@pytest.mark.parametrize("ignores_if_range", [False, True])
@pytest.mark.parametrize("size", [1_500_000, 1_200_000, 900_000, 1000])
def test_a_file_that_changed_is_never_spliced(server, tmp_path, ignores_if_range, size):
    out = tmp_path / "x.tar.gz"
    break_off(server, out)
    server.content, server.validators = OTHER[:size], {"ETag": '"2"'}
    server.ignores_if_range = ignores_if_range
    assert download(server.url, out)
    assert out.read_bytes() == OTHER[:size]


def test_a_change_of_size_alone_is_noticed(server, tmp_path):
    out = tmp_path / "x.tar.gz"
    break_off(server, out)
    server.content = OTHER[:1_200_000]
    assert download(server.url, out)
    assert out.read_bytes() == OTHER[:1_200_000]


def test_a_file_that_changes_between_attempts_is_never_spliced(server, tmp_path, monkeypatch):
    def change(seconds):
        server.content, server.validators = OTHER, {"ETag": '"2"'}

    monkeypatch.setattr(module.time, "sleep", change)
    server.drops = [700_000]
    assert download(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == OTHER


def test_no_length_told(server, tmp_path):
    server.tells_length = False
    assert download(server.url, tmp_path / "x", SHA256)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(server, tmp_path):
    out = tmp_path / "x.tar.gz"
    server.content = OTHER
    found = hashlib.md5(OTHER).hexdigest()
    with pytest.raises(InputError, match=rf"corpus.tar.gz: md5:{found}, not {MD5}: removed; try"):
        download(server.url, out, MD5)
    assert names(tmp_path) == set()
    server.content = CONTENT
    assert download(server.url, out, MD5)
    assert ranges(server) == [None, None]


def test_a_file_with_a_wrong_checksum_is_kept_and_refused(server, tmp_path):
    out = tmp_path / "x.tar.gz"
    assert download(server.url, out, MD5)
    out.write_bytes(OTHER)
    with pytest.raises(InputError, match=rf"x.tar.gz: md5:\w+, not {MD5}: remove it, and it is"):
        download(server.url, out, MD5)
    assert out.read_bytes() == OTHER
    assert len(server.requests) == 1


def test_a_checksum_is_remembered(server, tmp_path, monkeypatch):
    out = tmp_path / "x.tar.gz"
    out.write_bytes(CONTENT)
    computed = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda *args: computed.append(args[1]) or digest(*args))
    for checksum in (MD5, MD5, SHA256, SHA256):
        assert not download(server.url, out, checksum)
    assert computed == [MD5, SHA256] and not server.requests
    shutil.copyfile(out, tmp_path / "copy")
    (tmp_path / "copy").replace(out)
    assert not download(server.url, out, SHA256)
    assert computed == [MD5, SHA256, SHA256]


def test_statuses(server, tmp_path):
    with pytest.raises(InputError, match=r"nothing: HTTP 404 Not Found: correct the address"):
        download(server.url.replace("corpus.tar.gz", "nothing"), tmp_path / "x")
    assert len(server.requests) == 1
    server.statuses = [503, 429]
    assert download(server.url, tmp_path / "x")
    server.statuses = [503, 503, 503]
    with pytest.raises(InputError, match=r"HTTP 503 Service Unavailable: given up; try later"):
        download(server.url, tmp_path / "y")
    assert names(tmp_path) == {"x"}


def test_no_server(server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"Connection refused: given up; try later"):
        download(url, tmp_path / "x")


def test_a_server_that_falls_silent(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "WAITS", (0.0,))
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with (  # it accepts, and says nothing
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as silent,
        pytest.raises(InputError, match="timed out: given up"),
    ):
        download(f"http://127.0.0.1:{silent.server_port}/corpus.tar.gz", tmp_path / "x")


@pytest.mark.parametrize("url", ["ftp://a/b", "corpus.tar.gz", "http://a/b c", "http://a/ü"])
def test_bad_addresses(url, tmp_path):
    with pytest.raises(InputError, match="must begin with https:// or file://"):
        download(url, tmp_path / "x")


@pytest.mark.parametrize(
    "checksum",
    ["md5:12", "1" * 32, "sha1:" + "1" * 40, MD5.upper(), MD5[:-1], SHA256[:14], SHA256 + "0"],
)
def test_bad_checksums(checksum, tmp_path):
    with pytest.raises(InputError, match=f"checksum {checksum}: must be md5: or sha256:"):
        download("http://127.0.0.1/x", tmp_path / "x", checksum)


Usage = namedtuple("Usage", "total used free")


def set_free(monkeypatch, gigabytes):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(0, 0, int(gigabytes * 1e9)))


def test_space_is_checked_first(server, tmp_path, monkeypatch):
    out = tmp_path / "new" / "x.tar.gz"
    set_free(monkeypatch, 0.0014)
    with pytest.raises(InputError, match=r"needs 0.0 GB more on the disk of .*/new, which has 0.0"):
        download(server.url, out)
    set_free(monkeypatch, 0.0015)
    assert download(server.url, out)
    out.unlink()
    with pytest.raises(InputError, match=r"needs 2.0 GB more on the disk of"):
        download(server.url, out, needed_gb=2)
    with pytest.raises(InputError, match=r"more on the disk of"):
        download(server.url, out, unpack_to=tmp_path / "not yet" / "made")
    set_free(monkeypatch, 0.0015 * 2.25)
    assert download(server.url, out, unpack_to=tmp_path / "not yet" / "made")
    assert not (tmp_path / "not yet").exists()
    out.unlink()
    break_off(server, out)
    set_free(monkeypatch, (1_500_000 - 900_000) / 1e9)
    assert download(server.url, out)


def test_unwritable_places(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: File exists: make room there, or choose another"):
        download(server.url, tmp_path / "file" / "x")
    (tmp_path / "y.partial").mkdir()
    with pytest.raises(InputError, match=r"y.partial: Is a directory"):
        download(server.url, tmp_path / "y")


def test_several_processes_download_once(server, tmp_path):
    threads = [
        threading.Thread(target=download, args=(server.url, tmp_path / "x", MD5)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(server.requests) == 1


# ---------------------------------------------------------------------------- archives


def make_archive(path, files):
    """Write members, name to bytes or to a function of a TarInfo, into a tar or zip file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                content(member)
                archive.addfile(member)
    return path


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".lock", ".extracted"))
    }


CLEAN = {
    "LibriSpeech/README.TXT": b"read me",
    "LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt": b"103-1240-0000 A B\n",
    "LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac": CONTENT[:1000],
}
DEV = {
    "LibriSpeech/README.TXT": b"read me",
    "LibriSpeech/dev-clean/84/1/84-1-0000.flac": OTHER[:1000],
}
SUFFIXES = [".tar.gz", ".tgz", ".tar", ".zip"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_archives_are_merged(tmp_path, suffix):
    clean = make_archive(tmp_path / f"train clean{suffix}", CLEAN)
    dev = make_archive(tmp_path / f"dev{suffix}", DEV)
    out = tmp_path / "a folder" / "corpora"
    assert extract(clean, out) and extract(dev, out)
    assert tree(out) == CLEAN | DEV
    assert not extract(clean, out) and not extract(dev, out)
    assert not [path for path in out.iterdir() if path.name.endswith(".partial")]


def test_unpacked_once_though_the_archive_goes(tmp_path):
    archive, out = make_archive(tmp_path / "x.tar.gz", CLEAN), tmp_path / "out"
    assert not is_extracted(archive, out)
    extract(archive, out)
    assert is_extracted(archive, out)
    shutil.rmtree(out / "LibriSpeech" / "train-clean-100")
    assert not is_extracted(archive, out)
    assert extract(archive, out)
    assert tree(out) == CLEAN
    make_archive(archive, CLEAN | DEV)  # another of the same name
    assert not is_extracted(archive, out) and extract(archive, out)
    assert tree(out) == CLEAN | DEV
    archive.unlink()
    assert is_extracted(archive, out)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/posinv-evil"])
def test_paths_that_lead_out_are_refused(tmp_path, suffix, name):
    archive = make_archive(tmp_path / f"x{suffix}", {"good": b"good", name: b"evil"})
    out = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match=f"x{suffix}: '{re.escape(name)}' leads out of the folder"):
        extract(archive, out)
    assert tree(tmp_path) == {f"x{suffix}": archive.read_bytes()}


def test_links_that_lead_out_are_refused(tmp_path):
    def link(member):
        member.type, member.linkname = tarfile.SYMTYPE, "../../elsewhere"

    def device(member):
        member.type = tarfile.CHRTYPE

    for bad, why in ((link, "outside the destination"), (device, "special file")):
        archive = make_archive(tmp_path / "x.tar.gz", {"good": b"good", "bad": bad})
        with pytest.raises(InputError, match=f"x.tar.gz: .*{why}.*: refused, and nothing"):
            extract(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_broken_archives(tmp_path, suffix):
    archive = make_archive(tmp_path / f"x{suffix}", {"a": CONTENT, "b": OTHER})
    whole = archive.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:10], b"<html>not found</html>", b""):
        archive.write_bytes(part)
        with pytest.raises(InputError, match=rf"x{suffix}: not a whole archive \(.+\): remove it"):
            extract(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {}
    archive.write_bytes(whole)
    assert extract(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": CONTENT, "b": OTHER}


def test_a_damaged_byte_in_a_zip_file(tmp_path):
    archive = make_archive(tmp_path / "x.zip", {"a": CONTENT})
    content = bytearray(archive.read_bytes())
    content[700_000] ^= 255
    archive.write_bytes(content)
    with pytest.raises(InputError, match="not a whole archive"):
        extract(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("where", ["unpack", "merge"])
def test_an_interrupted_run_is_done_again(tmp_path, monkeypatch, where):
    archive = make_archive(tmp_path / "x.tar.gz", CLEAN | DEV)
    out = tmp_path / "out"
    (out / "LibriSpeech" / "dev-clean").mkdir(parents=True)
    with monkeypatch.context() as patch:
        if where == "unpack":
            patch.setattr(module, "_merge", lambda *_: 1 / 0)
        else:
            patch.setattr(module, "write_atomic", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(archive, out)
    assert not is_extracted(archive, out)
    (out / ".x.tar.gz.partial").mkdir()  # as a killed run leaves it
    (out / ".x.tar.gz.partial" / "stale").write_text("stale")
    assert extract(archive, out)
    assert tree(out) == CLEAN | DEV


def test_replaced_files_are_told(tmp_path, caplog):
    archive, out = make_archive(tmp_path / "x.zip", CLEAN), tmp_path / "out"
    (out / "LibriSpeech").mkdir(parents=True)
    (out / "LibriSpeech" / "README.TXT").write_text("something else")
    (out / "LibriSpeech" / "mine").write_text("mine")
    with caplog.at_level("INFO"):
        extract(archive, out)
    assert f"replaced {out / 'LibriSpeech' / 'README.TXT'} (1 in all)" in caplog.text
    assert tree(out) == CLEAN | {"LibriSpeech/mine": b"mine"}


def test_a_folder_in_a_files_place(tmp_path):
    archive, out = make_archive(tmp_path / "x.zip", CLEAN), tmp_path / "out"
    (out / "LibriSpeech" / "README.TXT").mkdir(parents=True)
    with pytest.raises(InputError, match=r"README.TXT: Is a directory"):
        extract(archive, out)


def test_space_for_unpacking(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "x.zip", {"zeros": bytes(2_000_000_000 // 1000)})
    set_free(monkeypatch, 0.0019)
    with pytest.raises(InputError, match=r"x.zip: needs 0.0 GB more on the disk of"):
        extract(archive, tmp_path / "out")
    set_free(monkeypatch, 0.002)
    assert extract(archive, tmp_path / "out")
    archive = make_archive(tmp_path / "x.tar.gz", {"a": CONTENT})
    set_free(monkeypatch, 0.0018)
    with pytest.raises(InputError, match=r"x.tar.gz: needs 0.0 GB more on the disk of"):
        extract(archive, tmp_path / "out2")
    with pytest.raises(InputError, match=r"x.tar.gz: needs 3.0 GB more on the disk of"):
        extract(archive, tmp_path / "out2", needed_gb=3)
    assert extract(archive, tmp_path / "out2", needed_gb=0.0018)


def test_other_names(tmp_path):
    with pytest.raises(InputError, match=r"x.rar: not a .tar.gz, .tgz, .tar or .zip file"):
        extract(tmp_path / "x.rar", tmp_path)
    with pytest.raises(InputError, match=r"x.zip: No such file"):
        extract(tmp_path / "x.zip", tmp_path)


def test_records_are_json(server, tmp_path):
    out = tmp_path / "x.tar.gz"
    break_off(server, out)
    record = json.loads((tmp_path / "x.tar.gz.partial.json").read_text())
    assert record == {"url": server.url, "validator": '"1"', "size": 1_500_000}
