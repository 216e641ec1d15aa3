"""New memory: in huge pages on a CPU; how much is free on a GPU, as alignments can be too large."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SLACK = 2**25  # bytes kept for small tensors and for what the allocator adds by rounding up


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor, of float32 or float64 and on the device of another one.

    On a CPU numpy allocates it: it asks Linux for huge pages, which torch does not. With small
    pages, the first write of a large array takes five times as long.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, "f4" if like.dtype == torch.float32 else "f8"))


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like another one, contiguous."""
    return empty(x.shape, x)


def has_room(cost: Tensor) -> bool:
    """Whether there is memory for two more arrays of the cost's size.

    True on a CPU, and where a GPU can't be asked: in torch.compile, and while a CUDA graph is
    captured.
    """
    if torch.compiler.is_compiling() or not cost.is_cuda:
        return True
    with torch.cuda.device(cost.device):
        if torch.cuda.is_current_stream_capturing():
            return True
    return 2 * cost.numel() * cost.element_size() <= free_bytes(cost.device)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a GPU, including those that PyTorch keeps for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept - _SLACK
