"""Caches of an SSL model's layers, by the content of the waveform: in memory, or in a file."""

import logging
import os
import shutil
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout

from posinv.errors import InputError

SAVE_EVERY = 64  # utterances; the file's index is written then


def content_key(wave: torch.Tensor) -> str:
    """Return a digest of a waveform's samples, 32 hexadecimal digits."""
    return blake2b(wave.detach().cpu().contiguous().numpy(), digest_size=16).hexdigest()


class LayerCache(Protocol):
    """The layers ``(L, F, D)`` of utterances."""

    def get(self, key: str) -> torch.Tensor | None:
        """Return an utterance's layers, None if they are not here."""

    def put(self, key: str, layers: torch.Tensor) -> torch.Tensor:
        """Take an utterance's layers, if there is room, and return what ``get`` will."""


class MemoryCache:
    """Layers as they are, in memory.

    Args:
        room: size in bytes. Layers that don't fit are not kept.
    """

    def __init__(self, room: float) -> None:
        self.layers: dict[str, torch.Tensor] = {}
        self._room = room

    def get(self, key: str) -> torch.Tensor | None:
        """Return an utterance's layers, None if they are not here."""
        return self.layers.get(key)

    def put(self, key: str, layers: torch.Tensor) -> torch.Tensor:
        """Take an utterance's layers if there is room, and return them."""
        size = layers.numel() * layers.element_size()
        if size <= self._room:
            self._room -= size
            self.layers[key] = layers
        return layers


class FileCache:
    """Layers in float16, in a file that is mapped into memory.

    float16 rounds a value by at most 0.05 %, below 6e-5 by at most 3e-8. For 12 utterances of
    ``egs/mini``, its SSL model and its heads, that changed a frame's weighted sum by at most
    0.014 % of its norm, and an utterance's loss by at most 0.014 %.

    ``layers.<part>`` holds one utterance after the other, ``index.<part>`` a line
    ``<key> <first value> <frames>`` for each. The line is written after the layers are on the disk,
    so that a process can be killed at any time: what has no whole line is not there. Each process
    of a training writes its own part, and reads all parts that are there when it begins.

    Args:
        folder: of one front end; made if it isn't there.
        num_layers: number of layers L.
        size: feature dimension D.
        part: number of this process.

    Raises:
        InputError: an index that is not one.
    """

    def __init__(self, folder: Path, num_layers: int, size: int, part: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.num_layers, self.size, self._part = folder, num_layers, size, part
        self._lock = FileLock(folder / f"lock.{part}")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            logging.info("%s: another training uses this cache: waiting until it ends", folder)
            self._lock.acquire()
        self._records: dict[str, tuple[int, int, int]] = {}  # part, first value, frames
        self._maps: dict[int, np.memmap] = {}
        parts = {part, *(int(path.suffix[1:]) for path in folder.glob("index.*"))}
        for number in sorted(parts):
            end = self._read_index(number)
            if number == part:
                self._end = end
        self._data = self._path("layers").open("ab", buffering=0)
        self._data.truncate(2 * self._end)  # what a killed process left without a line
        self._index = self._path("index").open("a", encoding="ascii")
        self._unsaved: list[str] = []

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> torch.Tensor | None:
        """Return an utterance's layers ``(L, F, D)``, float16 on the CPU; None if not here."""
        if key not in self._records:
            return None
        part, first, frames = self._records[key]
        shape = (self.num_layers, frames, self.size)
        end = first + int(np.prod(shape))
        if part not in self._maps or len(self._maps[part]) < end:
            # Copy-on-write, since torch takes no read-only arrays; nothing is written.
            self._maps[part] = np.memmap(self._path("layers", part), np.float16, "c")
        return torch.from_numpy(self._maps[part][first:end].reshape(shape))

    def put(self, key: str, layers: torch.Tensor) -> torch.Tensor:
        """Write an utterance's layers ``(L, F, D)``, and return them in float16.

        Raises:
            InputError: values beyond float16's range, or the disk is full.
        """
        half = layers.to(torch.float16)
        if not half.isfinite().all():
            raise InputError(
                f"--cache_dir: a layer has values up to {layers.abs().max():g}, beyond float16's "
                f"{torch.finfo(torch.float16).max:g}: train without --cache_dir"
            )
        values = half.cpu().contiguous().numpy()
        try:
            written = self._data.write(memoryview(values).cast("B"))
            if written != values.nbytes:
                raise OSError(0, f"only {written} of {values.nbytes} bytes could be written")
        except OSError as error:
            raise InputError(
                f"--cache_dir {self.folder}: {error.strerror}: make room, and start again"
            ) from error
        self._records[key] = (self._part, self._end, layers.size(1))
        self._unsaved.append(f"{key} {self._end} {layers.size(1)}\n")
        self._end += values.size
        if len(self._unsaved) == SAVE_EVERY:
            self.save()
        return half

    def save(self) -> None:
        """Bring to the disk what was put here: the layers first, their lines after."""
        os.fdatasync(self._data.fileno())
        self._index.writelines(self._unsaved)
        self._index.flush()
        self._unsaved.clear()

    def close(self) -> None:
        """Save, and let other trainings use the cache."""
        self.save()
        self._data.close()
        self._index.close()
        self._lock.release()

    def require_room(self, frames: Iterable[int]) -> None:
        """Raise InputError if the disk has no room for utterances of so many frames."""
        total = 2 * self.num_layers * self.size * sum(frames)
        there = sum(path.stat().st_size for path in self.folder.glob("layers.*"))
        free = shutil.disk_usage(self.folder).free
        if total - there > free:
            raise InputError(
                f"--cache_dir {self.folder}: the layers of training and validation set take "
                f"{total / 1e9:.1f} GB, of which {min(there, total) / 1e9:.1f} GB are there; the "
                f"disk has {free / 1e9:.1f} GB free: make room, choose another folder, or train "
                "without --cache_dir"
            )

    def _path(self, name: str, part: int | None = None) -> Path:
        return self.folder / f"{name}.{self._part if part is None else part}"

    def _read_index(self, part: int) -> int:
        """Read a part's index; return the number of values in its records."""
        path, data = self._path("index", part), self._path("layers", part)
        content = path.read_text(encoding="ascii") if path.exists() else ""
        values = data.stat().st_size // 2 if data.exists() else 0
        whole, newline, rest = content.rpartition("\n")
        if rest and part == self._part:  # half a line
            os.truncate(path, len(whole) + len(newline))
        end = 0
        for line in whole.splitlines():
            try:
                key, *numbers = line.split()
                first, frames = map(int, numbers)
            except ValueError:
                raise InputError(f"{path}: not an index: {line!r}: remove {self.folder}") from None
            end = first + self.num_layers * frames * self.size
            if end > values:
                raise InputError(f"{data}: shorter than its index says: remove {self.folder}")
            self._records[key] = (part, first, frames)
        return end
