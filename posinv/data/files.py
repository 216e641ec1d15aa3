"""Files and folders, written whole or not at all; YAML, read or refused with one line."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from posinv.errors import InputError


def write_whole(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, by way of a temporary file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_directory(out: Path | str) -> Iterator[Path]:
    """Fill a temporary folder beside ``out``, which takes its place if nothing fails.

    What ``out`` held goes: the caller has seen to it that it may.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        yield fresh
        if out.exists():
            out.rename(Path(scratch) / "old")
        fresh.rename(out)


@contextmanager
def new_directory(out: Path | str) -> Iterator[Path]:
    """Fill a temporary folder beside ``out``, which becomes ``out`` if nothing fails.

    Raises:
        InputError: ``out`` exists already and isn't an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; remove it or choose another folder")
    with replace_directory(out) as fresh:
        yield fresh


def read_yaml(path: Path, option: str) -> object:
    """Read the YAML file that ``option`` names.

    Raises:
        InputError: no such file, or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{option} {path}: not valid YAML: {error}") from error
