"""The device that a command runs on."""

import torch

from posinv.errors import InputError


def pick_device(ngpu: int) -> str:
    """Return ``"cpu"`` for ``--ngpu 0``, else ``"cuda"``, where CUDA is seen to work.

    Raises:
        InputError: there is no GPU, or CUDA fails to start.
    """
    if not ngpu:
        return "cpu"
    try:
        available = torch.cuda.is_available()
        if available:
            torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"--ngpu {ngpu}: CUDA does not start here ({why}): mend the driver (nvidia-smi), or "
            "use the CPU (--ngpu 0)"
        ) from error
    if not available:
        raise InputError(
            f"--ngpu {ngpu}: no GPU here that PyTorch can use: use the CPU (--ngpu 0), or see "
            "tools/check_install.py"
        )
    return "cuda"
