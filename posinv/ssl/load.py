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
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from posinv.data.files import atomic_folder
from posinv.errors import InputError
from posinv.ssl import sinusoidal_hubert  # noqa: F401  # registers its model type

MODEL_TYPES = (
    *("hubert", "wavlm", "wav2vec2", "data2vec-audio", "unispeech-sat", "sew"),
    *("wav2vec2-conformer", "wav2vec2-bert", "sinusoidal-hubert"),
)


def load_config(name_or_path: str | os.PathLike) -> PreTrainedConfig:
    """Return an SSL model's configuration without loading its weights.

    Args:
        name_or_path: A local folder with a ``config.json``, or a Hugging Face hub name.

    Raises:
        InputError: There is no such folder or hub model, or it is not of :data:`MODEL_TYPES`.
    """
    name = str(name_or_path)
    if name.endswith((".pt", ".pth")) or Path(name).is_file():
        raise InputError(
            f"SSL model {name}: a file; give a hub name or a folder of transformers. For a fairseq "
            "checkpoint, give the hub name of the same weights (facebook/hubert-base-ls960, "
            "microsoft/wavlm-base, facebook/wav2vec2-base), or convert it by models/hubert/"
            "convert_hubert_original_pytorch_checkpoint_to_pytorch.py (wavlm, wav2vec2: likewise), "
            "which is in the source repository of transformers but not in its package"
        )
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise InputError(f"SSL model {name}: no such folder; give a folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a config.json can be wrong in many ways
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


Steps = Sequence[tuple[int, int]]  # windows, each over the outputs of those before: size, stride


def convolutions(config: PreTrainedConfig) -> Steps:
    """Kernel and stride of each convolution over the samples.

    Wav2Vec2-BERT has none: for it, the windows of its filter banks, and the pairs of these.
    """
    if config.model_type == "wav2vec2-bert":
        return [(400, 160), (2, 2)]
    return list(zip(config.conv_kernel, config.conv_stride, strict=True))


def _steps(config: PreTrainedConfig) -> Steps:
    """Return the steps from samples to frames: SEW pools what its convolutions give."""
    pool = [(config.squeeze_factor,) * 2] if config.model_type == "sew" else []
    return [*convolutions(config), *pool]


def total_stride(steps: Steps) -> int:
    """Samples from one output of the last step to the next."""
    return math.prod(stride for _, stride in steps)


def receptive_field(steps: Steps) -> int:
    """Samples that one output of the last step is computed from."""
    samples = 1
    for size, stride in reversed(steps):
        samples = (samples - 1) * stride + size
    return samples


def output_lengths(steps: Steps, lengths: Tensor) -> Tensor:
    """Outputs of the last step for ``lengths`` samples (any shape, int)."""
    for size, stride in steps:
        lengths = (lengths - size).div(stride, rounding_mode="floor") + 1
    return lengths.clamp(min=0)


def hop(config: PreTrainedConfig) -> int:
    """Samples from one frame to the next (320 for HuBERT: 20 ms at 16 kHz; 640 for SEW)."""
    return total_stride(_steps(config))


def min_samples(config: PreTrainedConfig) -> int:
    """Samples of one frame (400 for HuBERT: 25 ms)."""
    return receptive_field(_steps(config))


def frame_lengths(config: PreTrainedConfig, lengths: Tensor) -> Tensor:
    """Frames that ``lengths`` samples (any shape, int) give; 0 for less than one frame."""
    return output_lengths(_steps(config), lengths)


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
    """Whether the encoder's layer norm comes after the layers, not before them.

    So it does in Large models and conformers. There, it turns the last hidden state into the
    model's output, and no hidden state depends on it.
    """
    if config.model_type in ("data2vec-audio", "sew", "wav2vec2-bert"):
        return False
    return config.model_type == "wav2vec2-conformer" or config.do_stable_layer_norm


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
                name_or_path,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
            )
    except Exception as error:  # transformers, torch's unpickler and safetensors raise many kinds
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
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({_first_line(error)}): mend or remove it") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: not settings by name: mend or remove it")
    return bool(settings.get("do_normalize", False))


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
        extractor = (
            SeamlessM4TFeatureExtractor
            if model.config.model_type == "wav2vec2-bert"
            else Wav2Vec2FeatureExtractor
        )
        extractor(do_normalize=normalize).save_pretrained(fresh)
        # safetensors writes files that other users cannot read.
        for file in fresh.iterdir():
            file.chmod(0o644)


def set_trainable(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Freeze every parameter but those whose names match a shell-style pattern.

    Parameters that no hidden state depends on would get no gradient and are always frozen: the
    mask embedding, what comes after the encoder's layers (an adapter, SEW's upsampling, the final
    layer norm of Large models and conformers), and the positional convolution of conformers.

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
    prefixes = ["masked_spec_embed", "adapter.", "intermediate_ffn.", "encoder.upsample."]
    if norm_is_last(model.config):
        prefixes.append("encoder.layer_norm.")
    if model.config.model_type == "wav2vec2-conformer":
        prefixes.append("encoder.pos_conv_embed.")
    return {p for name, p in model.named_parameters() if name.startswith(tuple(prefixes))}


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
