"""Atomic writers: a file or folder is there complete or not at all. Reading YAML."""

import errno
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path

import yaml

from posinv.errors import InputError

YAML_VALUES = 100_000  # in a file
# Errors of the disk, its file system or permissions; the data that is written is not to blame.
BAD_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
PROBE = 1 << 20  # bytes


@contextmanager
def naming_place(
    place: os.PathLike[str] | str, probe: os.PathLike[str] | str | None = None
) -> Iterator[None]:
    """Make a write error name the file or folder, and the reason, which libraries often omit.

    Args:
        place: the file or folder that is written; the error names it.
        probe: a file or folder on the same disk; None: ``place``. After an error without a known
            reason, 1 MiB is written there; if that fails, its error is the reason.

    Raises:
        OSError: no room, a read-only file system, no permission.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason: OSError | None = error if isinstance(error, OSError) else None
        if reason is None or reason.errno not in BAD_PLACE:
            reason = _fails_to_grow(Path(probe or place))
        if reason is None:
            raise
        raise OSError(reason.errno, reason.strerror, str(place)) from error


def _fails_to_grow(path: Path) -> OSError | None:
    try:
        with ExitStack() as stack:
            if path.is_dir():
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path)), "probe")
            file = stack.enter_context(path.open("ab", buffering=0))
            written = 0
            while written < PROBE:
                written += file.write(bytes(PROBE - written))
    except OSError as error:
        return error if error.errno in BAD_PLACE else None
    return None


@contextmanager
def atomic_file(path: os.PathLike[str] | str) -> Iterator[Path]:
    """Write a temporary file beside ``path``, which takes its place if nothing fails.

    The folder of ``path`` is made. The temporary file has the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with naming_place(path, temporary):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: os.PathLike[str] | str, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes with :func:`atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what :func:`atomic_file` left in a folder where processes of this host were killed.

    Args:
        folder: no other host writes there.
    """
    for path in folder.glob(".*"):
        _, pid, *name = path.name.split(".", 2)
        if name and pid.isdecimal() and _has_ended(pid):
            path.unlink()


@contextmanager
def atomic_folder(out: os.PathLike[str] | str, replaces: str | None = None) -> Iterator[Path]:
    """Fill a temporary folder beside ``out``, which takes its place if nothing fails.

    What an earlier process left when it was killed is removed.

    Args:
        out: the folder to write; it may exist if it is empty.
        replaces: a file name such as ``wav.scp``; a folder ``out`` that holds it is replaced.

    Raises:
        InputError: ``out`` exists and may not be replaced.
    """
    out = Path(out)
    replaceable = replaces is not None and (out / replaces).is_file()
    if out.exists() and not replaceable and (out.is_file() or any(out.iterdir())):
        without = f" and has no {replaces}" if replaces else ""
        raise InputError(f"{out}: exists already{without}: remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.{platform.node()}."
    _remove_leftovers(out.parent, prefix)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}.", dir=out.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        with naming_place(out, fresh):
            yield fresh
        if out.exists():
            out.rename(Path(scratch) / "old")
        fresh.rename(out)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the temporary folders of processes of this host that have been killed."""
    for path in parent.iterdir():
        pid = path.name.removeprefix(prefix).partition(".")[0]
        if path.name.startswith(prefix) and pid.isdecimal() and _has_ended(pid):
            shutil.rmtree(path)


def _has_ended(pid: str) -> bool:
    try:
        stat = Path("/proc", pid, "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(") ")[2].startswith(("Z", "X"))  # a killed one that waits for its parent


def file_digest(*paths: os.PathLike[str] | str) -> str:
    """Return the BLAKE2b digest of files, one after the other: 16 bytes, in hexadecimal."""
    digest = blake2b(digest_size=16)
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def read_text(path: Path, what_to_do: str = "correct its path") -> str:
    """Read a file of UTF-8 text, without its byte-order mark.

    Raises:
        InputError: no such file, one that can't be read (``what_to_do`` ends the message), or one
            that isn't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: {why}: {what_to_do}") from None
    except UnicodeDecodeError as error:
        line = 1 + path.read_bytes()[: error.start].count(b"\n")
        raise InputError(
            f"{path}: line {line}: not UTF-8 text ({error.reason}): convert it, such as with "
            "'iconv -f LATIN1 -t UTF-8'"
        ) from None


def read_yaml(path: Path, option: str) -> object:
    """Read the YAML file that ``option`` names; only plain values, no tags of Python objects.

    Raises:
        InputError: no such file, not YAML, or values that stand within themselves.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: {getattr(error, 'strerror', error)}") from error
    # ValueError: a date such as 2026-02-30, or an integer of thousands of digits
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{option} {path}: not valid YAML: {error}") from error
    if _values(value) > YAML_VALUES:
        raise InputError(
            f"{option} {path}: more than {YAML_VALUES} values once its aliases (*name) are "
            "resolved, or an alias within what it names: write them out"
        )
    return value


def _values(value: object) -> int:
    """Count the values within a YAML value, those of an alias at each of its places."""
    count, left = 0, [value]
    while left and count <= YAML_VALUES:
        count += 1
        if isinstance(node := left.pop(), dict):
            left += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set):
            left += node
    return count
