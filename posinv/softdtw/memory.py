"""Free memory of a GPU: alignments can be too large for it."""

import torch
from torch import Tensor

_SLACK = 2**25  # bytes kept for small tensors and for what the allocator adds by rounding up


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
