"""Self-supervised (SSL) speech models, batched so that padding changes nothing.

HuBERT, WavLM, wav2vec 2.0 and data2vec-audio come from ``transformers``. Zero-padding a batch
changes what they give for each utterance: Base models normalise their first convolution over
time (group norm), and every model's positional convolution and attention see the padding. Here
each utterance of a batch gets what it gets alone.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.wavlm.modeling_wavlm import WavLMAttention
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from posinv.data.files import new_directory
from posinv.errors import InputError
from posinv.lengths import valid_mask

MODEL_TYPES = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")

_MASKED_SDPA = "posinv_masked_sdpa"  # PyTorch's attention, with a mask even where nothing is padded
AttentionInterface.register(_MASKED_SDPA, ALL_ATTENTION_FUNCTIONS["sdpa"])
AttentionMaskInterface.register(
    _MASKED_SDPA,
    lambda **options: ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        **{**options, "allow_is_bidirectional_skip": False}
    ),
)


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


def extract(
    model: PreTrainedModel,
    waves: Tensor,
    lengths: Tensor,
    normalize: bool = False,
    time_mask: Tensor | None = None,
) -> tuple[BaseModelOutput, Tensor]:
    """Run an SSL model over a padded batch as if over each utterance alone.

    Group norm takes its statistics over each utterance's own frames; attention and the positional
    convolution do not see padding. Layer drop and SpecAugment stay off, in ``model.train()`` too,
    where dropout is on.

    Args:
        model: A model of :data:`MODEL_TYPES`.
        waves: (B, T) float; samples past an utterance's length are not read.
        lengths: (B,) int, in samples; on the CPU, a GPU is not waited for.
        normalize: Bring each utterance to zero mean and unit variance over its true length.
        time_mask: (B, F) bool, frames that get the model's mask embedding (masked prediction).

    Returns:
        The model's output, with ``hidden_states`` (frames past an utterance's end are undefined),
        and the frame lengths (B,), where ``lengths`` are. F is the longest utterance's frames.

    Raises:
        InputError: An utterance has less than one frame, or a length exceeds T.
    """
    config = model.config
    _check_lengths(lengths, waves.size(1), min_samples(config))
    waves = waves[:, : int(lengths.max())]
    valid = valid_mask(lengths, waves.size(1), waves.device)  # B, T
    waves = waves.masked_fill(~valid, 0.0)
    if normalize:
        waves = _normalize(waves, valid)
    frames = frame_lengths(config, lengths)
    with _ignoring_padding(model, waves, lengths, frames), _configured(config):
        output = model(
            waves,
            attention_mask=valid.long(),
            mask_time_indices=time_mask,
            output_hidden_states=True,
            return_dict=True,
        )
    return output, frames


def save_pretrained(model: PreTrainedModel, directory: str | os.PathLike, normalize: bool) -> None:
    """Write a folder that ``from_pretrained`` and :class:`SSLUpstream` load.

    It holds ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, and appears
    complete or not at all.

    Args:
        model: The SSL model.
        directory: The folder to write.
        normalize: Whether the model takes normalised input (``do_normalize``).

    Raises:
        InputError: ``directory`` exists already and is not an empty folder.
    """
    with new_directory(directory) as fresh:
        with _no_progress_bar():
            model.save_pretrained(fresh)
        Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(fresh)
        # safetensors keeps the weights from other users.
        for file in fresh.iterdir():
            file.chmod(0o644)


class SSLUpstream(nn.Module):
    """An SSL speech model: every layer's hidden states of a padded batch.

    ``(waves (B, T), lengths (B,))`` gives ``(hidden (L + 1, B, F, D), frame_lengths (B,))``, where
    ``hidden[i]`` is, for each utterance, what ``transformers`` gives as ``hidden_states[i]`` of
    that utterance alone, and zero past its end. See :func:`extract`.

    Every parameter is frozen but those whose names match ``trainable``. Modules without trainable
    parameters stay in eval mode whatever ``train()`` asks. The model itself is :attr:`model`.

    Args:
        name_or_path: A local folder or a Hugging Face hub name.
        random_init: Draw the weights from torch's generator instead of loading them; a folder
            then needs no more than a ``config.json``.
        trainable: Shell-style patterns over the parameter names of :attr:`model`, for example
            ``encoder.layers.10.*``.
        normalize: Bring each utterance to zero mean and unit variance. None: what the model's
            ``preprocessor_config.json`` says in ``do_normalize``, False where there is none.

    Raises:
        InputError: The model cannot be loaded, or a pattern matches no parameter.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        random_init: bool = False,
        trainable: Sequence[str] = (),
        normalize: bool | None = None,
    ):
        super().__init__()
        config = load_config(name_or_path)
        self.model = (
            AutoModel.from_config(config) if random_init else _load_model(name_or_path, config)
        )
        self.normalize = _reads_normalized(name_or_path) if normalize is None else normalize
        self._set_trainable(trainable)
        logging.info("SSL model %s: input normalised: %s", name_or_path, self.normalize)
        self.eval()

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def output_size(self) -> int:
        """Width of a hidden state, D."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of hidden states, L + 1: the transformer's input and each layer's output."""
        return self.config.num_hidden_layers + 1

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return hop(self.config)

    @property
    def min_samples(self) -> int:
        """The shortest utterance, one frame, in samples."""
        return min_samples(self.config)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames that ``lengths`` samples (int tensor) give."""
        return frame_lengths(self.config, lengths)

    def check_layer(self, layer: int | None) -> int:
        """Return the index of a hidden state; see :func:`check_layer`."""
        return check_layer(self.config, layer)

    def train(self, mode: bool = True) -> "SSLUpstream":
        """Set the training mode where parameters are trainable; all else stays in eval mode."""
        super().train(False)
        if mode:
            _train_where_trainable(self.model)
        return self

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return every hidden state and the frame lengths.

        Args:
            waves: (B, T) float, 16 kHz.
            lengths: (B,) int, in samples, from :attr:`min_samples` to T.

        Returns:
            ``(L + 1, B, F, D)`` and ``(B,)``, F the longest utterance's frames.

        Raises:
            InputError: An utterance has less than one frame, or a length exceeds T.
        """
        output, frames = extract(self.model, waves, lengths, self.normalize)
        hidden = torch.stack(output.hidden_states)  # L + 1, B, F, D
        padding = ~valid_mask(frames, hidden.size(2), hidden.device)
        return hidden.masked_fill(padding[:, :, None], 0.0), frames

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the model as a folder; see :func:`save_pretrained`."""
        save_pretrained(self.model, directory, self.normalize)

    def _set_trainable(self, patterns: Sequence[str]) -> None:
        parameters = dict(self.model.named_parameters())
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                examples = ", ".join(list(parameters)[:: max(1, len(parameters) // 3)][:4])
                raise InputError(
                    f"trainable: {pattern!r} matches no parameter; there are, for example, "
                    f"{examples}"
                )
        for name, parameter in parameters.items():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        trained = [p.numel() for p in parameters.values() if p.requires_grad]
        logging.info(
            "SSL model: %d of %d parameter tensors trainable (%d of %d values): %s",
            len(trained),
            len(parameters),
            sum(trained),
            sum(p.numel() for p in parameters.values()),
            ", ".join(patterns) or "frozen",
        )
        extractor = self.model.feature_extractor
        if not any(p.requires_grad for p in extractor.parameters()):
            # Otherwise it asks for its input's gradient in training mode.
            extractor._freeze_parameters()


def _train_where_trainable(module: nn.Module) -> None:
    trainable = {p.requires_grad for p in module.parameters()}
    if trainable == {True}:
        module.train()
    elif trainable == {True, False}:
        module.training = True
        for child in module.children():
            _train_where_trainable(child)


class Frozen:
    """A module that the ``nn.Module`` holding it does not see.

    It stays out of its holder's parameters, checkpoints, device moves and ``train()``; it is in
    eval mode, takes no gradient in its parameters (its input may) and follows its input's device.

    Args:
        module: The module, also :attr:`module`.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)

    def __call__(self, x: Tensor, *args: object) -> object:
        """Call the module, moved to the device of ``x`` first if it is elsewhere."""
        held = next(chain(self.module.parameters(), self.module.buffers()), None)
        if held is not None and held.device != x.device:
            self.module.to(x.device)
        return self.module(x, *args)


def _load_model(name_or_path: str | os.PathLike, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with _no_progress_bar():
            model, info = AutoModel.from_pretrained(
                name_or_path, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"SSL model {name_or_path}: its weights cannot be loaded ({_first_line(error)})"
        ) from error
    # A model without mask embedding is used without masks.
    missing = sorted(k for k in info["missing_keys"] if "masked_spec_embed" not in k)
    if missing:
        raise InputError(
            f"SSL model {name_or_path}: its weights lack {len(missing)} of the configuration's "
            f"parameters, such as {missing[0]}; check that config.json belongs to them"
        )
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _reads_normalized(name_or_path: str | os.PathLike) -> bool:
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_lengths(lengths: Tensor, total: int, minimum: int) -> None:
    for index, length in enumerate(lengths.tolist()):
        if length < minimum:
            raise InputError(
                f"utterance {index} of the batch has {length} samples, less than the {minimum} "
                "of one SSL frame; leave out or join such short utterances"
            )
        if length > total:
            raise InputError(
                f"utterance {index} of the batch: its length of {length} samples exceeds the "
                f"{total} samples given"
            )


def _normalize(waves: Tensor, valid: Tensor) -> Tensor:
    """Zero mean and unit variance as ``Wav2Vec2FeatureExtractor`` has them; ``waves`` 0-padded."""
    count = valid.sum(1, keepdim=True)
    centred = (waves - waves.sum(1, keepdim=True) / count) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-7).sqrt()


# What of the first convolution's output a CPU makes at a time. Larger tensors come fresh from the
# system, each time; for HuBERT-Base that takes a third of all the convolutions' time.
_PIECE_BYTES = 8 * 2**20


def _convolve(model: PreTrainedModel, wave: Tensor) -> Tensor:
    """Return the convolutions' features (1, C, F) of one utterance (1, T), without gradient."""
    config, extractor = model.config, model.feature_extractor
    kernel, stride = config.conv_kernel[0], config.conv_stride[0]
    rows = hop(config) // stride  # of the first convolution's output, to a frame
    frames = max(1, _PIECE_BYTES // (4 * config.conv_dim[0] * rows))
    pieces = _pieces(wave, frames, hop(config), min_samples(config))
    if wave.device.type != "cpu" or len(pieces) == 1:
        return type(extractor).forward(extractor, wave)
    layers = list(extractor.conv_layers)
    if isinstance(getattr(layers[0], "layer_norm", None), nn.GroupNorm):
        layers[0] = _normalised_over(layers[0], _pieces(wave, frames * rows, stride, kernel))
    features = []
    for piece in pieces:
        x = piece[:, None]
        for layer in layers:
            x = layer(x)
        features.append(x)
    return torch.cat(features, dim=2)


def _pieces(wave: Tensor, outputs: int, stride: int, field: int) -> list[Tensor]:
    """Cut (1, T) into what gives so many outputs each, of ``field`` samples every ``stride``."""
    count = (wave.size(1) - field) // stride + 1
    return [
        wave[:, start * stride : (min(start + outputs, count) - 1) * stride + field]
        for start in range(0, count, outputs)
    ]


def _normalised_over(layer: nn.Module, pieces: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the first layer of a Base model, its group norm's statistics those of all pieces."""
    norm = layer.layer_norm  # of as many groups as channels
    counts, means, variances = [], [], []
    for piece in pieces:
        x = layer.conv(piece[:, None])[0].float()  # C, N
        counts.append(x.size(1))
        means.append(x.mean(1))
        variances.append((x - means[-1][:, None]).square_().mean(1))  # torch.var: 20 times as long
    share = torch.tensor(counts)[:, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    within, between = torch.stack(variances), (torch.stack(means) - mean).square()
    variance = (share * (within + between)).sum(0)

    def forward(x: Tensor) -> Tensor:
        x = layer.conv(x)
        x = F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        return layer.activation(x)

    return forward


def _attend(
    attention: WavLMAttention, x: Tensor, mask: Tensor | None, bias: Tensor
) -> tuple[Tensor, None]:
    """Do WavLM's self-attention (B, F, D) as the other families do theirs.

    ``transformers`` puts frames before utterances, which PyTorch then projects frame by frame, and
    keeps the heads' weights to average them.

    Args:
        attention: the module.
        x: (B, F, D).
        mask: (B, F), 1 or True at valid frames; None if all are.
        bias: (B * heads, F, F), the gated relative position bias.
    """
    q, k, v = (
        project(x).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # B, H, F, D / H
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = bias.view(len(x), -1, *bias.shape[1:])
    if mask is not None:
        bias = bias.masked_fill(mask.ne(1)[:, None, None], -math.inf)
    dropout = attention.dropout if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout)
    return attention.out_proj(out.transpose(1, 2).flatten(2)), None


@contextmanager
def _ignoring_padding(
    model: PreTrainedModel, waves: Tensor, lengths: Tensor, frames: Tensor
) -> Iterator[None]:
    """Make the model's convolutions and group norm see each utterance alone.

    Where no gradient goes through them, the waveform's convolutions take one utterance after the
    other: no time goes into padding. Otherwise, where that takes longer for small models on several
    threads, group norm alone does. In front of the positional convolutions, padding becomes zeros;
    ``transformers`` does so once, but data2vec has several, and HuBERT's may have a batch norm
    before it. WavLM's attention is :func:`_attend`.
    """
    extractor = model.feature_extractor
    norm = getattr(extractor.conv_layers[0], "layer_norm", None)

    def one_by_one(waves: Tensor) -> Tensor:  # B, T -> B, C, F
        features = [
            _convolve(model, wave[None, :length])[0].mT
            for wave, length in zip(waves, lengths.tolist(), strict=True)
        ]
        return nn.utils.rnn.pad_sequence(features, batch_first=True).mT

    def group_norm(x: Tensor) -> Tensor:  # B, C, N; F.group_norm is exactly the lone utterance's
        kernel, stride = model.config.conv_kernel[0], model.config.conv_stride[0]
        counts = ((lengths - kernel).div(stride, rounding_mode="floor") + 1).tolist()
        return torch.cat(
            [
                F.pad(
                    F.group_norm(
                        one[None, :, :n], norm.num_groups, norm.weight, norm.bias, norm.eps
                    ),
                    (0, x.size(2) - n),
                )
                for one, n in zip(x, counts, strict=True)
            ]
        )

    def zero_padding(_module: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args  # B, D, F
        return x.masked_fill(~valid_mask(frames, x.size(2), x.device)[:, None], 0.0)

    hooks = [
        module.register_forward_pre_hook(zero_padding)
        for module in model.encoder.pos_conv_embed.modules()
        if isinstance(module, nn.Conv1d)
    ]
    replaced = [
        (module, "torch_multi_head_self_attention", partial(_attend, module))
        for module in model.encoder.modules()
        if isinstance(module, WavLMAttention)
    ]
    learns = waves.requires_grad or any(p.requires_grad for p in extractor.parameters())
    if not (learns and torch.is_grad_enabled()):
        replaced.append((extractor, "forward", one_by_one))
    elif isinstance(norm, nn.GroupNorm):
        replaced.append((norm, "forward", group_norm))
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, _ in replaced:
            delattr(module, name)
        for hook in hooks:
            hook.remove()


@contextmanager
def _configured(config: PreTrainedConfig) -> Iterator[None]:
    """Switch layer drop (a dropped layer would have no hidden state) and SpecAugment off.

    So is the look of ``transformers`` at whether there is padding, which waits for a GPU. The
    configuration is put back, as it is saved with the model.
    """
    switches = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    if config._attn_implementation == "sdpa":
        switches["_attn_implementation"] = _MASKED_SDPA
    before = {name: getattr(config, name) for name in switches}
    try:
        for name, value in switches.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
