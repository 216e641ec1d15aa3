"""Download files, with resuming, and unpack archives; both atomically."""

import filecmp
import hashlib
import json
import logging
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse, InvalidURL
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from ssl import SSLCertVerificationError
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from posinv import __version__
from posinv.data.files import write_atomic
from posinv.errors import InputError

TIMEOUT = 60.0  # seconds to wait for an answer, or for more of a file
WAITS = (1.0, 3.0, 9.0)  # seconds before new attempts; an attempt that got more starts them anew
UNVERIFIED = "unverified"  # in place of a checksum that nobody has published
UNPACKED = 1.25  # unpacked, an archive of audio takes at most this many times its own size

MAX_RATIO = 50  # of what an archive holds to its own size, beyond MIN_BOMB
MIN_BOMB = 10**9  # bytes

_GB = 10**9
_CHUNK = 1 << 18
_CHECKSUM = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{8,64}")
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may pass


def download(
    url: str,
    out: Path | str,
    checksum: str | None = None,
    needed_gb: float | None = None,
    unpack_to: Path | str | None = None,
) -> bool:
    """Download a file, unless it is there.

    Until it is complete and its checksum verified, it is called ``<out>.partial``. A new attempt
    after a dropped connection, or a later call, resumes it if the file on the server is still the
    same: ``<out>.partial.json`` keeps its ETag or time of change, and its size. Otherwise the
    download starts again. ``<out>.ok`` keeps the verified checksum with the file's size and time,
    so that it isn't computed at every call. If several processes ask for a file, one downloads it
    and the others wait.

    Args:
        url: https or file address; http of this machine alone.
        out: the file to write; its folder is made.
        checksum: ``md5:`` or ``sha256:`` and hexadecimal digits, of SHA-256 the first 8 or more,
            as in the names of torch.hub's files; without one, a file that is there is right. Of the
            network, a file needs one, or :data:`UNVERIFIED`.
        needed_gb: space in GB (10^9 bytes) that must be free beside the file's own; default
            none, or 1.25 times the file's with ``unpack_to``.
        unpack_to: folder whose disk must have that space; default: that of ``out``.

    Returns:
        False if the file was there already.

    Raises:
        InputError: an address without encryption, or that the server leads on to one; no checksum;
            the server has no such file or doesn't answer after a few attempts; too little
            space; a wrong checksum, of what was there, which stays, or of what came, which goes.
    """
    out = Path(out)
    _require_safe(url)
    if checksum == UNVERIFIED:
        checksum = None
    elif checksum is None and not _is_local(url):
        raise InputError(
            f"{url}: no checksum: give what is published (--checksum sha256:... or md5:...), or, "
            f"if there is none, --checksum {UNVERIFIED}"
        )
    if checksum and not _CHECKSUM.fullmatch(checksum):
        raise InputError(f"checksum {checksum}: must be md5: or sha256: and its hex digits")
    ok = out.with_name(f"{out.name}.ok")
    with _locked(out):
        if out.exists():
            if checksum and (found := _other_digest(out, checksum, ok)):
                raise InputError(
                    f"{out}: {found}, not {checksum}: remove it, and it is downloaded again"
                )
            return False
        partial = _Partial(url, out, needed_gb, Path(unpack_to) if unpack_to else None)
        partial.complete()
        if checksum and (found := _other_digest(partial.path, checksum, ok)):
            partial.discard()
            raise InputError(
                f"{url}: {found}, not {checksum}: removed; try again, or correct the checksum"
            )
        partial.path.replace(out)
        partial.discard()
    return True


def _is_local(url: str) -> bool:
    """Whether an address is of this machine: a file, or a server on a loopback address."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.scheme == "file" or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _require_safe(url: str) -> None:
    if not re.fullmatch(r"(https?|file)://[!-~]+", url):
        raise InputError(f"{url}: must begin with https:// or file://, and be %-encoded")
    if url.startswith("http:") and not _is_local(url):
        raise InputError(
            f"{url}: not encrypted, so anyone on the way can change it: give its https address"
        )


class _SafeRedirects(HTTPRedirectHandler):
    """Follows a server to another address, but not to http or from the network to this machine."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        _require_safe(newurl)
        if newurl.startswith("file:") or (_is_local(newurl) and not _is_local(req.full_url)):
            raise InputError(
                f"{req.full_url}: leads to {newurl}, an address of this machine: refused"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_open_url = build_opener(_SafeRedirects).open


def _other_digest(path: Path, checksum: str, ok: Path) -> str | None:
    """Return the file's digest if it isn't the checksum's; remember in ``ok`` if it is."""
    stat = path.stat()
    identity = {"checksum": checksum, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    record = json.dumps(identity) + "\n"
    if ok.exists() and ok.read_bytes() == record.encode():
        return None
    found = _digest(path, checksum)
    if not found.startswith(checksum):
        return found
    write_atomic(ok, record)
    return None


def _digest(path: Path, checksum: str) -> str:
    algorithm = checksum.partition(":")[0]
    try:
        with path.open("rb") as file:
            return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: it should be a file") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Only one process at a time works on a path. Its folder is made.
    with _local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logging.info("%s: waiting for another process that works on it", path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: {error.strerror}: make room there, or choose another place"
        ) from error


def _require_space(source: str, wanted: list[tuple[Path, float]]) -> None:
    # wanted: folders, and the bytes needed in each; those on one disk add up
    disks: dict[int, tuple[Path, float]] = {}
    for folder, size in wanted:
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        first, sum_so_far = disks.get(device, (folder, 0.0))
        disks[device] = first, sum_so_far + size
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(
                f"{source}: needs {size / _GB:.1f} GB more on the disk of {folder}, which has "
                f"{free / _GB:.1f} GB free: make room, or choose a folder on another disk"
            )


def _progress(name: str, total: int | None, initial: int = 0) -> tqdm:
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file isn't to fill up
    )


# --------------------------------------------------------------------------- transfer


@dataclass(frozen=True)
class _Version:
    """Identifies one version of a file on a server.

    ``validator`` is for If-Range: a strong ETag or the time of change. If it is empty, nothing is
    resumed.
    """

    url: str
    validator: str
    size: int | None

    @classmethod
    def of(cls, url: str, response: HTTPResponse) -> "_Version":
        etag, length = response.headers["ETag"], response.headers["Content-Length"]
        validator = etag if etag and etag[0] == '"' else response.headers["Last-Modified"]
        return cls(url, validator or "", int(length) if length else None)

    def goes_on_with(self, response: HTTPResponse, start: int) -> bool:
        """Whether a response with status 206 is the rest of this version, from byte ``start``."""
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers["Content-Range"] or "")
        given = response.headers["ETag" if self.validator[0] == '"' else "Last-Modified"]
        return (
            span is not None
            and int(span[1]) == start
            and (self.size is None or span[2] in (str(self.size), "*"))
            and given in (self.validator, None)
        )


class _Partial:
    """A file on its way, beside ``out``."""

    def __init__(self, url: str, out: Path, needed_gb: float | None, unpack_to: Path | None):
        self.url, self._needed_gb, self._unpack_to = url, needed_gb, unpack_to
        self.path = out.with_name(f"{out.name}.partial")
        self._version_file = out.with_name(f"{out.name}.partial.json")

    def discard(self) -> None:
        with _local_errors(self.path):
            self.path.unlink(missing_ok=True)
            self._version_file.unlink(missing_ok=True)

    def complete(self) -> None:
        """Download the rest; give up after a few attempts in a row that got no more of it."""
        furthest, failures = self._size(), 0
        while True:
            try:
                return self._attempt()
            except (URLError, HTTPException, OSError) as error:
                why = _reason(error)
                if not self._may_pass(error):
                    raise InputError(f"{self.url}: {why}: correct the address") from error
            if self._size() > furthest:
                furthest, failures = self._size(), 0
            if failures == len(WAITS):
                kept = "what has come is kept for the next run" if self._size() else "try later"
                raise InputError(f"{self.url}: {why}: given up; {kept}")
            logging.warning("%s: %s; trying again in %g s", self.url, why, WAITS[failures])
            time.sleep(WAITS[failures])
            failures += 1

    def _attempt(self) -> None:
        version = self._version()
        start = self._size() if version else 0
        if version and start == version.size:
            return
        with self._open(version, start) as response:
            if response.status == 206:
                if not (version and start and version.goes_on_with(response, start)):
                    raise self._changed()
            else:
                self.discard()
                version, start = _Version.of(self.url, response), 0
            self._check_space(version.size or 0, start)
            with _local_errors(self.path):
                file = self.path.open("ab")
                write_atomic(self._version_file, json.dumps(asdict(version)) + "\n")
            with file, _progress(self.path.stem, version.size, start) as bar:
                while chunk := response.read(_CHUNK):
                    with _local_errors(self.path):
                        file.write(chunk)
                        file.flush()
                    bar.update(len(chunk))
        if version.size not in (None, self._size()):
            raise ConnectionError(f"broken off after {self._size()} of {version.size} bytes")

    def _open(self, version: _Version | None, start: int) -> HTTPResponse:
        request = Request(self.url, headers={"User-Agent": f"posinv/{__version__}"})
        if version and start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", version.validator)
        try:
            return _open_url(request, timeout=TIMEOUT)
        except HTTPError as error:
            if error.code == 416:  # it has no more bytes than we have
                raise self._changed() from error
            raise

    def _changed(self) -> ConnectionError:
        self.discard()
        return ConnectionError("the file has changed on the server")

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _version(self) -> _Version | None:
        try:
            version = _Version(**json.loads(self._version_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return version if version.url == self.url and version.validator else None

    def _check_space(self, size: int, start: int) -> None:
        estimate = UNPACKED * size if self._unpack_to else 0.0
        extra = estimate if self._needed_gb is None else self._needed_gb * _GB
        folder = self.path.parent
        _require_space(self.url, [(folder, size - start), (self._unpack_to or folder, extra)])

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, HTTPError):
            return error.code in _TRANSIENT
        why = error.reason if isinstance(error, URLError) else error
        final = SSLCertVerificationError, InvalidURL, str
        return not self.url.startswith("file:") and not isinstance(why, final)


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, URLError) else error
    return str(getattr(reason, "strerror", None) or reason) or type(reason).__name__


# -------------------------------------------------------------------------- archives


def extract(archive: Path | str, directory: Path | str, needed_gb: float | None = None) -> bool:
    """Unpack a tar archive (.tar, .tar.gz, .tgz) or a zip file, unless that is done.

    Its files are merged into the folder, beside those of other archives; a file of the same name is
    replaced, and the log says so. They are unpacked in a hidden folder first, so that an
    interrupted run leaves nothing that looks finished; a new run starts again.

    Args:
        archive: the file.
        directory: is made.
        needed_gb: space in GB (10^9 bytes) that a tar archive takes; default 1.25 times its own
            size. A zip file says what it takes.

    Returns:
        False if it was unpacked already: see :func:`is_extracted`.

    Raises:
        InputError: not an archive of these kinds, or a broken one; a member that would be
            written outside the folder, or a link that leads there; one that holds more than
            :data:`MAX_RATIO` times its size; too little space.
    """
    archive, directory = Path(archive), Path(directory)
    check_archive_name(archive)
    with _locked(directory / "extract"):
        if is_extracted(archive, directory):
            return False
        fresh = directory / f".{archive.name}.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            with _local_errors(fresh):
                fresh.mkdir()
                names = _unpack(archive, fresh, needed_gb)
                replaced = _merge(fresh, directory)
        except tarfile.FilterError as error:
            raise InputError(f"{archive}: {error}: refused, and nothing unpacked") from error
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(
                f"{archive}: not a whole archive ({error}): remove it and get it again"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        if replaced:
            logging.info("%s: replaced %s (%d in all)", archive, replaced[0], len(replaced))
        done = {"size": archive.stat().st_size, "names": names}
        write_atomic(_extracted_file(archive, directory), json.dumps(done) + "\n")
    return True


def check_archive_name(archive: Path | str) -> None:
    """Raise :class:`InputError` if a file isn't called as archives are that can be unpacked."""
    if not str(archive).endswith((".tar.gz", ".tgz", ".tar", ".zip")):
        raise InputError(f"{archive}: not a .tar.gz, .tgz, .tar or .zip file, to be unpacked")


def is_extracted(archive: Path | str, directory: Path | str) -> bool:
    """Whether an archive of this name was unpacked in a folder.

    ``<directory>/.<archive>.extracted`` records its size and the upper two levels of what it held.
    These must be there; the archive may be gone, but not of another size.
    """
    archive, directory = Path(archive), Path(directory)
    try:
        done = json.loads(_extracted_file(archive, directory).read_text(encoding="utf-8"))
        there = all((directory / name).exists() for name in done["names"])
        return there and (not archive.exists() or archive.stat().st_size == done["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _extracted_file(archive: Path, directory: Path) -> Path:
    return directory / f".{archive.name}.extracted"


def _unpack(archive: Path, fresh: Path, needed_gb: float | None) -> list[str]:
    # Returns the upper two levels of what it holds.
    names: set[str] = set()
    size, held = archive.stat().st_size, 0  # bytes, and bytes unpacked

    def check(name: str) -> None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{archive}: '{name}' leads out of the folder: nothing was unpacked")
        names.add("/".join(path.parts[:2]))

    def accept(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        check(member.name)
        hold(member.size)
        return tarfile.data_filter(member, path)

    def hold(content: int) -> None:
        nonlocal held
        held += content
        if held > max(MIN_BOMB, MAX_RATIO * size):
            raise InputError(
                f"{archive}: {size / _GB:.3f} GB that hold more than {held / _GB:.1f} GB, which "
                "looks like a bomb: nothing was unpacked; if you trust it, unpack it yourself"
            )
        _require_space(str(archive), [(fresh, float(content))])

    with _progress(archive.name, size) as bar, archive.open("rb") as file:
        source = CallbackIOWrapper(bar.update, file)
        if archive.suffix == ".zip":
            with zipfile.ZipFile(source) as zipped:
                members = zipped.infolist()
                for member in members:
                    check(member.filename)
                hold(sum(member.file_size for member in members))
                zipped.extractall(fresh)
        else:
            taken = UNPACKED * size if needed_gb is None else needed_gb * _GB
            _require_space(str(archive), [(fresh, taken)])
            with tarfile.open(fileobj=source, mode="r|*") as tar:
                tar.extractall(fresh, filter=accept)
    return sorted(names - {""})


def _merge(source: Path, target: Path) -> list[Path]:
    # Returns the files replaced by others.
    replaced = []
    for entry in sorted(source.iterdir()):
        to = target / entry.name
        if entry.is_dir() and to.is_dir():
            replaced += _merge(entry, to)
            continue
        if to.exists() and not filecmp.cmp(entry, to, shallow=False):
            replaced.append(to)
        entry.replace(to)
    return replaced
