"""What torch's transforms (torch.func, torch.compile) ask of our autograd functions."""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


def in_transform(x: Tensor) -> bool:
    """Whether torch.func, torch.compile or is_grads_batched looks at what is computed from x here.

    Then x may have no memory to read, and nothing may be changed in place.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(x)
    )


class BatchFunction(torch.autograd.Function):
    """An autograd function of batches: vmap makes one batch (V B, ...) of V batches (B, ...)."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call the function; all its arguments are given, by position.

        torch's own ``apply`` inspects the signature first. This takes longer than a small batch.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        args = unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        """Compute all batches as one."""
        V = info.batch_size

        def joined(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            arg = arg.expand(V, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return arg.flatten(0, 1)

        def parted(x: Tensor) -> Tensor:
            return x.unflatten(0, (V, -1))

        out = cls.apply(*map(joined, args, in_dims))
        if isinstance(out, tuple):
            return tuple(map(parted, out)), (0,) * len(out)
        return parted(out), 0
