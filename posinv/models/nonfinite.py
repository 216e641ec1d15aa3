"""Where numbers stop being finite in a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, batch: Mapping[str, Any], loss_of: Callable) -> str:
    """Say which module of a model first gives a value that is not finite (NaN or infinite).

    The forward and, if that is finite, the backward pass run once more; gradients are set to None
    after it, and the random state is as before. Modules that come in a plain list, as the criteria
    of ESPnet's enhancement models, are watched, too.

    Args:
        model: in the mode it was in.
        batch: its keyword arguments.
        loss_of: the loss in the model's output.

    Returns:
        A clause for a message, such as ``the first module with such a value is encoder.layers.3
        (Linear)``.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite itself"
    found: list[str] = []
    with torch.random.fork_rng(), ExitStack() as hooks:
        for name, module in _modules(model):
            watch = partial(_watch, found, f"{name} ({type(module).__name__})" if name else "")
            hooks.callback(module.register_forward_hook(watch).remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = partial(_watch_gradient, found, name)
                hooks.callback(parameter.register_hook(hook).remove)
        loss = loss_of(model(**batch))
        if found:
            return f"the first module with such a value is {found[0]}"
        if not loss.isfinite().all():
            return "all modules' outputs are finite: the loss computed from them is not"
        loss.sum().backward()
    model.zero_grad(set_to_none=True)
    if found:
        return f"the loss is finite; the first gradient that is not is that of {found[0]}"
    return "run once more, loss and gradients are finite: their draws differ from those before"


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    known = dict(model.named_modules())
    for name, value in list(vars(model).items()):
        for i, module in enumerate(value if isinstance(value, list) else ()):
            if isinstance(module, nn.Module):
                for inner, submodule in module.named_modules(prefix=f"{name}.{i}"):
                    known.setdefault(inner, submodule)
    yield from known.items()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _watch(found: list[str], name: str, _module: nn.Module, _args: tuple, output: object) -> None:
    if name and not found and not all(x.isfinite().all() for x in _tensors(output)):
        found.append(name)


def _watch_gradient(found: list[str], name: str, gradient: Tensor) -> None:
    if not found and not gradient.isfinite().all():
        found.append(name)
