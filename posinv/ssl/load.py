"""Loading and saving of SSL models, and the choice of the parameters to train."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from posinv.data.files import atomic_folder
from posinv.errors import InputError

MODEL_TYPES = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")


def load_config(name_or_path: str | os.PathLike) -> PreTrainedConfig:
    """Return an SSL model's configuration without loading its weights.

    Args:
        name_or_path: A local folder with a ``config.json``, or a Hugging Face hub name.

    Raises:
        InputError: There is no such folder or hub model, or it is not of :data:`MODEL_TYPES`.
    """
    name = str(name_or_path)
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise InputError(f"SSL model {name}: no such folder; give a folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"SSL model {name}: neither a local folder with a config.json nor a hub model that "
            f"can be fetched ({_first_line(error)})"
        ) from error
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"SSL model {name}: model type {config.model_type!r} is not supported; "
            f"choose one of {', '.join(MODEL_TYPES)}"
        )
    return config


def hop(config: PreTrainedConfig) -> int:
    """Samples from one frame to the next (320 for HuBERT: 20 ms at 16 kHz)."""
    return math.prod(config.conv_stride)


def min_samples(config: PreTrainedConfig) -> int:
    """Samples of one frame, the convolutions' receptive field (400 for HuBERT: 25 ms)."""
    samples = 1
    for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def frame_lengths(config: PreTrainedConfig, lengths: Tensor) -> Tensor:
    """Frames that ``lengths`` samples (any shape, int) give; 0 for less than one frame."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - kernel).div(stride, rounding_mode="floor") + 1
    return lengths.clamp(min=0)


def check_layer(config: PreTrainedConfig, layer: int | None) -> int:
    """Return the index of a hidden state: 0 to ``num_hidden_layers``, the last for -1 or None.

    Raises:
        InputError: ``layer`` is out of that range.
    """
    last = config.num_hidden_layers
    if layer is None or layer == -1:
        return last
    if not 0 <= layer <= last:
        raise InputError(
            f"layer {layer} is out of range: this SSL model has hidden states 0 to {last} "
            "(-1 for the last)"
        )
    return layer


def norm_is_last(config: PreTrainedConfig) -> bool:
    """Whether the encoder's layer norm comes after the layers (Large models), not before them.

    If so, it turns the last hidden state into the model's output. No hidden state depends on it.
    """
    return config.model_type != "data2vec-audio" and config.do_stable_layer_norm


def load_model(
    name_or_path: str | os.PathLike, config: PreTrainedConfig, random_init: bool = False
) -> PreTrainedModel:
    """Return an SSL model, in float32.

    Args:
        name_or_path: A local folder or a Hugging Face hub name.
        config: Its configuration, see :func:`load_config`.
        random_init: Draw the weights from torch's generator instead of loading them.

    Raises:
        InputError: The weights cannot be loaded, or do not belong to the configuration.
    """
    if random_init:
        return AutoModel.from_config(config, dtype=torch.float32)
    try:
        with _no_progress_bar():
            model, info = AutoModel.from_pretrained(
                name_or_path, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"SSL model {name_or_path}: its weights cannot be loaded ({_first_line(error)})"
        ) from error
    # Only masked prediction needs the mask embedding.
    missing = sorted(k for k in info["missing_keys"] if "masked_spec_embed" not in k)
    if missing:
        raise InputError(
            f"SSL model {name_or_path}: its weights lack {len(missing)} of the configuration's "
            f"parameters, such as {missing[0]}; check that config.json belongs to them"
        )
    return model


def reads_normalized(name_or_path: str | os.PathLike) -> bool:
    """Whether a model's ``preprocessor_config.json`` says ``do_normalize``; False without one."""
    path = cached_file(
        str(name_or_path),
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        logging.info(
            "SSL model %s: no preprocessor_config.json, so its input is not normalised",
            name_or_path,
        )
        return False
    return bool(json.loads(Path(path).read_text(encoding="utf-8")).get("do_normalize", False))


def save_pretrained(model: PreTrainedModel, directory: str | os.PathLike, normalize: bool) -> None:
    """Write a model as a folder for ``from_pretrained`` and ``posinv.ssl.SSLUpstream``.

    It holds ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, and is written
    atomically.

    Args:
        model: The SSL model.
        directory: The folder to write.
        normalize: Whether the model takes normalised input (``do_normalize``).

    Raises:
        InputError: ``directory`` exists already and is not an empty folder.
    """
    with atomic_folder(Path(directory)) as fresh:
        with _no_progress_bar():
            model.save_pretrained(fresh)
        Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(fresh)
        # safetensors writes files that other users cannot read.
        for file in fresh.iterdir():
            file.chmod(0o644)


def set_trainable(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Freeze every parameter but those whose names match a shell-style pattern.

    Parameters that no hidden state depends on would get no gradient and are always frozen: the
    mask embedding, an adapter after the encoder, and a Large model's final layer norm.

    Raises:
        InputError: A pattern matches no parameter that the hidden states depend on.
    """
    parameters = dict(model.named_parameters())
    unused = _unused(model)
    used = [name for name, parameter in parameters.items() if parameter not in unused]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in used):
            examples = ", ".join(used[:: max(1, len(used) // 3)][:4])
            raise InputError(
                f"trainable: {pattern!r} matches no parameter that the hidden states depend on; "
                f"there are, for example, {examples}"
            )
    model.requires_grad_(False)
    for name in used:
        parameters[name].requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    trained = [p.numel() for p in parameters.values() if p.requires_grad]
    logging.info(
        "SSL model: %d of %d parameter tensors trainable (%d of %d values): %s",
        len(trained),
        len(parameters),
        sum(trained),
        sum(p.numel() for p in parameters.values()),
        ", ".join(patterns) or "frozen",
    )


def train_where_trainable(model: PreTrainedModel) -> None:
    """Put modules in training mode, except those without trainable parameters."""
    _train_where_trainable(model, _unused(model))


def _train_where_trainable(module: nn.Module, unused: Set[nn.Parameter]) -> None:
    trainable = {p.requires_grad for p in module.parameters() if p not in unused}
    if trainable == {True}:
        module.train()
    elif trainable == {True, False}:
        module.training = True
        for child in module.children():
            _train_where_trainable(child, unused)


def _unused(model: PreTrainedModel) -> Set[nn.Parameter]:
    """Return the parameters that no hidden state depends on when nothing is masked."""
    prefixes: tuple[str, ...] = ("masked_spec_embed", "adapter.")
    if norm_is_last(model.config):
        prefixes += ("encoder.layer_norm.",)
    return {p for name, p in model.named_parameters() if name.startswith(prefixes)}


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
