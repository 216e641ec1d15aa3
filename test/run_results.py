"""Compare the results of two runs of a recipe, file by file."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

# Files that may differ though the results are the same: logs, times, records of the command, plots.
NOT_COMPARED = re.compile(
    r".*\.log(\.room)?|.*/log/.*|.*/log|.*/(stages\.tsv|report\.html)|.*/tensorboard/.*|.*\.png"
    r"|(.*/)?\.lock.*|(.*/)?\.\d+\..*"  # and what a killed process was writing
)


def results(folder: Path, names: Sequence[str] = ("data", "dump", "exp")) -> dict[str, str]:
    """Return the digest of each result file of a run; the keys are paths relative to ``folder``."""
    return {
        str(path.relative_to(folder)): digest(path)
        for name in names
        for path in (folder / name).rglob("*")
        if path.is_symlink() or path.is_file()
        if not NOT_COMPARED.fullmatch(str(path.relative_to(folder)))
    }


def digest(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True, map_location="cpu")
        if "checkpoint" in path.name:
            state = [state[name] for name in ("model", "optimizers", "schedulers")]
        content = b"".join(plain(state))
    elif path.name == "RESULTS.md":
        content = "".join(table_cells(path.read_text())).encode()
    elif path.name == "README.md":  # a model's card
        content = re.sub(rb"(?m)^- date: .*$", b"", path.read_bytes())
    elif path.name == "config.yaml":
        content = re.sub(rb"(?m)^(resume|ngpu): .*$", b"", path.read_bytes())
    else:
        content = path.read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def table_cells(text: str) -> Iterator[str]:
    """Yield the cells of a page's tables, but those of times."""
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()]
        for row in rows:
            yield from (c for name, c in zip(rows[0], row, strict=True) if name != "minutes")


def plain(state: object) -> Iterator[bytes]:
    """Yield what a checkpoint holds."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield repr(key).encode()
            yield from plain(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from plain(value)
    elif isinstance(state, torch.Tensor):
        yield state.numpy().tobytes()
    else:
        yield repr(state).encode()


def differences(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple]:
    """Return the files in which two results differ."""
    return {
        name: (ours.get(name), theirs.get(name))
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    }
