"""Atomic writers: a file or folder is there complete or not at all. Reading YAML."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import yaml

from posinv.errors import InputError


@contextmanager
def atomic_file(path: os.PathLike[str] | str) -> Iterator[Path]:
    """Write a temporary file beside ``path``, which takes its place if nothing fails.

    The folder of ``path`` is made. The temporary file has the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: os.PathLike[str] | str, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes with :func:`atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


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
        yield fresh
        if out.exists():
            out.rename(Path(scratch) / "old")
        fresh.rename(out)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the temporary folders of processes of this host that have been killed."""
    for path in parent.iterdir():
        pid = path.name.removeprefix(prefix).partition(".")[0]
        if path.name.startswith(prefix) and pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path)


def file_digest(*paths: os.PathLike[str] | str) -> str:
    """Return the BLAKE2b digest of files, one after the other: 16 bytes, in hexadecimal."""
    digest = blake2b(digest_size=16)
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def read_yaml(path: Path, option: str) -> object:
    """Read the YAML file that ``option`` names.

    Raises:
        InputError: no such file, or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{option} {path}: not valid YAML: {error}") from error
