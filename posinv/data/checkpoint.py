"""Checkpoints of torch, read without running code that they may hold."""

import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from posinv.data.files import atomic_file
from posinv.errors import InputError

_save = torch.save  # the trainer puts another in its place


def read_checkpoint(path: Path | str, mmap: bool = False) -> object:
    """Read a file of ``torch.save`` into CPU memory with ``weights_only=True``.

    Args:
        path: the file.
        mmap: map it, so that no more is read than is used.

    Raises:
        InputError: no such file, not a checkpoint, or one with other Python objects than tensors
            and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}: train first, or correct the checkpoint's path"
        ) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: not tensors alone, as torch loads them with weights_only "
            f"({textwrap.shorten(str(error), 200)}): save the state dict by itself"
        ) from error
    # torch and its unpickler raise many kinds for what is no checkpoint
    except Exception as error:
        raise InputError(
            f"{path}: not a checkpoint that torch can load ({type(error).__name__}): give the file "
            "that training saved"
        ) from error


def write_checkpoint(state: object, path: Path) -> None:
    """Write a file as ``torch.save`` does, atomically."""
    # torch writes the name of a path into the file, but not that of a stream
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        _save(state, file)


def load_weights(model: nn.Module, state: object, path: Path | str, of: str) -> None:
    """Load a state dict into a model, every key of both.

    Args:
        model: gets the weights.
        state: what :func:`read_checkpoint` read.
        path: of the checkpoint, for the message.
        of: what the model is, for the message.

    Raises:
        InputError: the state dict is of another model.
    """
    try:
        if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
            raise TypeError("no state dict")
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{path}: not weights of {of} ({textwrap.shorten(str(error), 200)}): give the "
            "checkpoint of that training"
        ) from error
