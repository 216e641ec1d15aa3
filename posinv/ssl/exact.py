"""The forward of an SSL model over a padded batch, exact: the padding has no effect.

In ``transformers``, the padding of a batch changes an utterance's hidden states. Base models
normalise the output of their first convolution over time (group norm), and in every model the
positional convolution and the attention see the padding, in conformers each layer's convolution
too. :func:`extract` calls the model's own modules, but uses the lengths, so that each utterance
gets the hidden states that it gets alone. It does not modify the model. So threads may share a
model, and gradient checkpointing computes again exactly what was computed first.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, SeamlessM4TFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from posinv.errors import InputError
from posinv.lengths import Lengths, checked_lengths, valid_mask
from posinv.ssl.load import (
    check_layer,
    convolutions,
    frame_lengths,
    min_samples,
    norm_is_last,
    output_lengths,
    receptive_field,
    total_stride,
)
from posinv.ssl.sinusoidal_hubert import PositionalEmbedding

_Module = Any  # a module of transformers: mypy takes an nn.Module's attributes for Tensor | Module


def extract(
    model: PreTrainedModel,
    waves: Tensor,
    lengths: Lengths,
    normalize: bool = False,
    time_mask: Tensor | None = None,
    layer: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return an SSL model's hidden states of a padded batch; each utterance's are as if alone.

    Dropout is on in modules in training mode; layer drop and SpecAugment are always off. Batch
    norm always uses its stored statistics.

    Args:
        model: A model of :data:`~posinv.ssl.load.MODEL_TYPES`.
        waves: (B, T) floating point, converted to the model's type; samples past an utterance's
            length are not read.
        lengths: (B,) int, in samples. If they are on the CPU, nothing waits for a GPU.
        normalize: Bring each utterance to zero mean and unit variance over its true length.
        time_mask: (B, F) bool, frames that get the model's mask embedding (masked prediction). In
            SEW, which pools them in pairs afterwards, they are the frames before that.
        layer: 0 to L, or -1 for the last: that hidden state alone, and no layer above it is
            computed. None for all.

    Returns:
        The hidden state ``(B, F, D)``, or all ``(L + 1, B, F, D)``, of which ``[i]`` is
        ``hidden_states[i]`` of ``transformers``. F is the longest utterance's frames; frames past
        an utterance's end are zero. And the frame lengths (B,), on the device of ``lengths``.

    Raises:
        InputError: Other shapes or types, a layer out of range, an utterance of less than one
            frame, a length that exceeds T, or a mask for a model without mask embedding.
    """
    config = model.config
    last = check_layer(config, layer)
    samples = _checked_samples(config, waves, lengths)
    waves = _prepared(waves, samples, normalize)
    if config.model_type == "wav2vec2-bert":
        x = _filter_banks(config, waves, samples).to(model.dtype)
    else:
        x = _convolve(model, waves.to(model.dtype), samples)
    valid = valid_mask(output_lengths(convolutions(config), samples), x.size(1), x.device)
    x = _project(model, x)  # B, F, D
    if time_mask is not None:
        x = _masked(model, x, time_mask)

    frames = frame_lengths(config, samples)
    padding = ~valid_mask(frames, int(frames.max()), x.device)[:, :, None]
    states = (state.masked_fill(padding, 0.0) for state in _hidden_states(model, x, valid, last))
    hidden = torch.stack(list(states)) if layer is None else deque(states, maxlen=1).pop()
    return hidden, frames.to(lengths.device) if isinstance(lengths, Tensor) else frames


def model_output(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return a model's output ``(B, F, D)``, ``last_hidden_state``, from its last hidden state.

    They differ in Large models and conformers, whose encoders end in a layer norm, and in SEW,
    whose output has a frame for each of its convolutions' (of an odd number, the last is left out).
    An adapter after the encoder is left out.
    """
    encoder: _Module = model.encoder
    if model.config.model_type == "sew":
        return encoder.upsample(hidden)
    return encoder.layer_norm(hidden) if norm_is_last(model.config) else hidden


def _checked_samples(config: PreTrainedConfig, waves: Tensor, lengths: Lengths) -> Tensor:
    """Return the lengths on the CPU."""
    if not (isinstance(waves, Tensor) and waves.is_floating_point() and waves.dim() == 2):
        given = (
            f"{waves.dtype} of shape {tuple(waves.shape)}"
            if isinstance(waves, Tensor)
            else type(waves).__name__
        )
        raise InputError(f"waves must be a floating-point tensor of shape (B, T), got {given}")
    if not len(waves):
        raise InputError("waves must have at least one utterance, got shape (0, T)")
    if isinstance(lengths, Tensor):
        lengths = lengths.cpu()
    samples = checked_lengths("lengths", lengths, len(waves), waves.size(1), waves)
    for index, length in enumerate(samples.tolist()):
        if length < min_samples(config):
            raise InputError(
                f"utterance {index} of the batch has {length} samples, less than the "
                f"{min_samples(config)} of one SSL frame; leave out or join such short utterances"
            )
    return samples


def _prepared(waves: Tensor, samples: Tensor, normalize: bool) -> Tensor:
    """Return the waveforms, zero past the lengths and normalised if asked for."""
    waves = waves[:, : int(samples.max())]
    valid = valid_mask(samples, waves.size(1), waves.device)  # B, T
    waves = waves.masked_fill(~valid, 0.0)
    if normalize:
        waves = _normalize(waves.to(torch.promote_types(waves.dtype, torch.float32)), valid)
    return waves


def _normalize(waves: Tensor, valid: Tensor) -> Tensor:
    """Normalise zero-padded waveforms as ``Wav2Vec2FeatureExtractor`` does."""
    count = valid.sum(1, keepdim=True)
    centred = (waves - waves.sum(1, keepdim=True) / count) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-7).sqrt()


def _project(model: _Module, x: Tensor) -> Tensor:
    """Return the features (B, F, C) in the width of the hidden states."""
    if model.config.model_type == "sew":
        x = model.layer_norm(x)
        if model.project_features:
            x = model.feature_projection(x)
        return model.feature_dropout(x)
    x = model.feature_projection(x)
    return x[0] if isinstance(x, tuple) else x


def _masked(model: _Module, x: Tensor, time_mask: Tensor) -> Tensor:
    if time_mask.shape != x.shape[:2]:
        raise InputError(
            f"time_mask must be {tuple(x.shape[:2])}, got shape {tuple(time_mask.shape)}"
        )
    if not hasattr(model, "masked_spec_embed"):
        raise InputError("time_mask: this SSL model has no mask embedding")
    return torch.where(time_mask[:, :, None], model.masked_spec_embed.to(x.dtype), x)


def _call(layer: _Module, forward: Callable, x: Tensor, *args: Tensor | None) -> Tensor:
    """Call a layer of ``transformers``, with gradient checkpointing if that is enabled.

    Args:
        layer: The layer.
        forward: The layer itself, or our function that takes its place.
        x: Its input.
        args: Its other arguments.
    """
    checkpoints = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    if checkpoints and not x.requires_grad and any(p.requires_grad for p in layer.parameters()):
        # Re-entrant checkpointing gives parameters a gradient only if the input requires one.
        x = x.detach().requires_grad_()
    if checkpoints and forward is not layer:
        return layer._gradient_checkpointing_func(forward, x, *args)
    return forward(x, *args)


def _filter_banks(config: PreTrainedConfig, waves: Tensor, samples: Tensor) -> Tensor:
    """Return the input of Wav2Vec2-BERT, (B, F, 160) float64, with a gradient into the waveforms.

    These are Kaldi's log-mel filter banks as ``SeamlessM4TFeatureExtractor`` computes them: 80
    every 10 ms, brought to zero mean and unit variance over the utterance, in pairs. They are in
    float64, since one band may be far weaker than another.
    """
    (size, stride), (pair, _) = convolutions(config)
    window, filters = _mel_filters(waves.device)
    features = []
    for wave, length in zip(waves, samples.tolist(), strict=True):
        x = (2**15 * wave[:length].double()).unfold(0, size, stride)
        x = x - x.mean(1, keepdim=True)
        x = x - 0.97 * torch.cat([x[:, :1], x[:, :-1]], dim=1)
        spectrum = torch.fft.rfft(x * window, 512)
        power = spectrum.real.square() + spectrum.imag.square()
        x = (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
        x = (x - x.mean(0)) / (x.var(0) + 1e-7).sqrt()
        features.append(x[: len(x) // pair * pair].reshape(-1, pair * x.size(1)))
    return nn.utils.rnn.pad_sequence(features, batch_first=True)


@cache
@torch.inference_mode(False)  # for all later calls, whatever mode the first is in
def _mel_filters(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the window (400,) and the filters (257, 80)."""
    extractor = SeamlessM4TFeatureExtractor()
    window, filters = extractor.window, extractor.mel_filters
    return torch.from_numpy(window).to(device), torch.from_numpy(filters).to(device)


def _convolve(model: _Module, waves: Tensor, samples: Tensor) -> Tensor:
    """Return the convolutions' features (B, F, C) of zero-padded waveforms (B, T).

    Without gradient, they take one utterance after the other, which saves the time for padding.
    With gradient, that would be slower for small models on several threads. There they take the
    whole batch at once, and only group norm takes one utterance after the other.
    """
    extractor = model.feature_extractor
    learns = waves.requires_grad or any(p.requires_grad for p in extractor.parameters())
    if not (learns and torch.is_grad_enabled()):
        with torch.no_grad():
            features = [
                _convolve_alone(model, wave[None, :length])[0].mT
                for wave, length in zip(waves, samples.tolist(), strict=True)
            ]
        return nn.utils.rnn.pad_sequence(features, batch_first=True)
    x = waves[:, None]
    for layer in extractor.conv_layers:
        forward = layer
        if _has_group_norm(layer):
            kernel, stride = model.config.conv_kernel[0], model.config.conv_stride[0]
            counts = ((samples - kernel).div(stride, rounding_mode="floor") + 1).tolist()
            forward = partial(_normalised_alone, layer, counts)
        x = _call(layer, forward, x)
    return x.mT


def _has_group_norm(layer: nn.Module) -> bool:
    """Whether this is the first convolution of a Base model."""
    return isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm)


def _normalised_alone(layer: _Module, counts: Sequence[int], x: Tensor) -> Tensor:
    """Compute the first layer of a Base model, with group norm over each utterance's own frames.

    Args:
        layer: The layer.
        counts: (B,) frames of each utterance after the convolution.
        x: (B, 1, T).
    """
    x, norm = layer.conv(x), layer.layer_norm
    x = torch.cat(
        [
            F.pad(
                F.group_norm(one[None, :, :n], norm.num_groups, norm.weight, norm.bias, norm.eps),
                (0, x.size(2) - n),
            )
            for one, n in zip(x, counts, strict=True)
        ]
    )
    return layer.activation(x)


# On a CPU, the size of the first convolution's output for one piece of audio. The memory of larger
# tensors is requested from the system each time, which takes a third of the time of HuBERT-Base's
# convolutions.
_PIECE_BYTES = 8 * 2**20


def _convolve_alone(model: _Module, wave: Tensor) -> Tensor:
    """Return the convolutions' features (1, C, F) of one utterance (1, T), without gradient."""
    config, layers = model.config, list(model.feature_extractor.conv_layers)
    steps = convolutions(config)
    kernel, stride = steps[0]
    rows = total_stride(steps[1:])  # of the first convolution's output, for one frame
    frames = max(1, _PIECE_BYTES // (4 * config.conv_dim[0] * rows))
    pieces = _pieces(wave, frames, total_stride(steps), receptive_field(steps))
    if wave.device.type != "cpu" or len(pieces) == 1:
        pieces = [wave]
    elif _has_group_norm(layers[0]):
        layers[0] = _normalised_over(layers[0], _pieces(wave, frames * rows, stride, kernel))
    features = []
    for piece in pieces:
        x = piece[:, None]
        for layer in layers:
            x = layer(x)
        features.append(x)
    return torch.cat(features, dim=2)


def _pieces(wave: Tensor, outputs: int, stride: int, field: int) -> list[Tensor]:
    """Cut (1, T) into overlapping pieces that give ``outputs`` outputs each, the last one fewer.

    An output is computed from ``field`` samples, and the next one ``stride`` samples later.
    """
    count = (wave.size(1) - field) // stride + 1
    return [
        wave[:, start * stride : (min(start + outputs, count) - 1) * stride + field]
        for start in range(0, count, outputs)
    ]


def _normalised_over(layer: _Module, pieces: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the first layer of a Base model, with group norm's statistics over all pieces."""
    norm = layer.layer_norm  # one group a channel
    counts, means, variances = [], [], []
    for piece in pieces:
        x = layer.conv(piece[:, None])[0]  # C, N
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        counts.append(x.size(1))
        means.append(x.mean(1))
        variances.append((x - means[-1][:, None]).square_().mean(1))  # torch.var: 20 times slower
    share = torch.tensor(counts, dtype=x.dtype)[:, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    within, between = torch.stack(variances), (torch.stack(means) - mean).square()
    variance = (share * (within + between)).sum(0)
    mean, variance = mean.to(norm.weight.dtype), variance.to(norm.weight.dtype)

    def forward(x: Tensor) -> Tensor:
        x = layer.conv(x)
        x = F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        return layer.activation(x)

    return forward


def _hidden_states(model: _Module, x: Tensor, valid: Tensor, last: int) -> Iterator[Tensor]:
    """Yield the hidden states (B, F, D), 0 to ``last``, of projected features (B, F, D)."""
    config, encoder = model.config, model.encoder
    family = config.model_type
    x = x.masked_fill(~valid[:, :, None], 0.0)
    conformer = family in ("wav2vec2-conformer", "wav2vec2-bert")
    if not conformer:
        position = _position(encoder.pos_conv_embed, x, valid)
        if family == "sew":
            x = encoder.pool(x.mT).mT
            position = position[:, : x.size(1)]
            valid = valid[:, config.squeeze_factor - 1 :: config.squeeze_factor]
        x = x + position
        if not norm_is_last(config):
            x = encoder.layer_norm(x)
    x = encoder.dropout(x)
    yield x
    forward: Callable | None = None  # in place of a layer's own
    args: tuple[Tensor | None, ...]
    if family == "wavlm":
        size = x.size(1)
        bias = encoder.layers[0].attention.compute_bias(size, size)  # H, F, F
        forward, args = partial(_wavlm_layer, norm_is_last(config)), (bias, valid)
    elif conformer:
        forward = _conformer_layer if family == "wav2vec2-conformer" else None
        args = (_attention_mask(config, x, valid), _relative_positions(encoder, x), valid)
    else:
        args = (_attention_mask(config, x, valid),)
    for layer in islice(encoder.layers, last):
        x = _call(layer, partial(forward, layer) if forward else layer, x, *args)
        yield x


def _position(embedding: _Module, x: Tensor, valid: Tensor) -> Tensor:
    """Compute the positional embedding of (B, F, D) from input whose padding is zero."""
    if isinstance(embedding, PositionalEmbedding):
        return embedding(x)
    padding = ~valid[:, None]
    x = x.mT
    if hasattr(embedding, "layers"):  # data2vec-audio
        for layer in embedding.layers:
            x = layer(x.masked_fill(padding, 0.0))
        return x.mT
    if getattr(embedding, "batch_norm", None) is not None:
        x = _batch_norm(embedding.batch_norm, x).masked_fill(padding, 0.0)
    return embedding.activation(embedding.padding(_positional_convolution(embedding.conv, x))).mT


def _positional_convolution(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Convolve (B, D, F); bfloat16 on a CPU is computed in float32.

    On CPUs with AMX, oneDNN's results in bfloat16 are wrong for 2 to 12 channels in a group and
    kernel sizes such as 16 or 32, which small models have (torch 2.13; see pytorch issue 163347).
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if x.is_cuda or dtype != torch.bfloat16:
        return conv(x)
    weight, bias = conv.weight.float(), None if conv.bias is None else conv.bias.float()
    with torch.autocast("cpu", enabled=False):
        y = F.conv1d(x.float(), weight, bias, conv.stride, conv.padding, groups=conv.groups)
    return y.bfloat16()


def _batch_norm(norm: _Module, x: Tensor) -> Tensor:
    """Compute batch norm of (B, C, F) with its stored statistics, also in training mode."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def _relative_positions(encoder: _Module, x: Tensor) -> Tensor | None:
    """Return the ``relative_position_embeddings`` of a conformer's layers for (B, F, D).

    The modules that compute them in ``transformers`` keep the last ones, for any thread to find.
    """
    kind, embedding = encoder.config.position_embeddings_type, encoder.embed_positions
    size = x.size(1)
    if kind == "relative":
        table = embedding.extend_pe(x, embedding.pe)  # 1, 2 N - 1, D
        zero = table.size(1) // 2
        return table[:, zero - size + 1 : zero + size]
    if kind == "rotary":
        times = torch.arange(size, device=x.device).to(embedding.inv_freq)
        angles = torch.outer(times, embedding.inv_freq).tile(2)
        return torch.stack([angles.cos(), angles.sin()])[:, :, None, None].to(x)
    return None


def _attention_mask(config: PreTrainedConfig, x: Tensor, valid: Tensor) -> Tensor | None:
    """Return the layers' ``attention_mask``."""
    if config._attn_implementation == "sdpa":
        # create_bidirectional_mask checks whether there is padding, which waits for a GPU.
        return valid[:, None, None]
    return create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=valid)


def _conformer_layer(
    layer: _Module, x: Tensor, mask: Tensor | None, positions: Tensor | None, valid: Tensor
) -> Tensor:
    """Compute an encoder layer of a wav2vec2-conformer.

    Args:
        layer: The layer.
        x: (B, F, D).
        mask: The layer's ``attention_mask``.
        positions: Its ``relative_position_embeddings``.
        valid: (B, F), true at valid frames.
    """
    x = x + 0.5 * layer.ffn1(layer.ffn1_layer_norm(x))
    attended, _ = layer.self_attn(layer.self_attn_layer_norm(x), mask, positions)
    x = x + layer.self_attn_dropout(attended)
    module = layer.conv_module
    y = module.layer_norm(x).masked_fill(~valid[:, :, None], 0.0).mT
    y = module.glu(module.pointwise_conv1(y))  # has no bias: zeros stay zeros
    y = module.activation(_batch_norm(module.batch_norm, module.depthwise_conv(y)))
    x = x + module.dropout(module.pointwise_conv2(y)).mT
    x = x + 0.5 * layer.ffn2(layer.ffn2_layer_norm(x))
    return layer.final_layer_norm(x)


def _wavlm_layer(
    norm_first: bool, layer: _Module, x: Tensor, bias: Tensor, valid: Tensor
) -> Tensor:
    """Compute an encoder layer of WavLM.

    Args:
        norm_first: Whether layer norms come before attention and feed-forward, as in Large models.
        layer: The layer.
        x: (B, F, D).
        bias: (H, F, F), the relative position bias.
        valid: (B, F), true at valid frames.
    """
    if norm_first:
        x = x + layer.dropout(_attend(layer.attention, layer.layer_norm(x), bias, valid))
        return x + layer.feed_forward(layer.final_layer_norm(x))
    x = layer.layer_norm(x + layer.dropout(_attend(layer.attention, x, bias, valid)))
    return layer.final_layer_norm(x + layer.feed_forward(x))


def _attend(attention: WavLMAttention, x: Tensor, bias: Tensor, valid: Tensor) -> Tensor:
    """Compute WavLM's self-attention, (B, F, D), by PyTorch's function for the other families.

    The code in ``transformers`` is slower: it puts the frame dimension first, so that PyTorch
    projects frame by frame, and keeps the heads' weights to average them.

    Args:
        attention: The module.
        x: (B, F, D).
        bias: (H, F, F), the relative position bias, which a gate scales at each frame.
        valid: (B, F), true at valid frames.
    """

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # B, H, F, D / H

    gates = attention.gru_rel_pos_linear(heads(x)).unflatten(3, (2, 4)).sum(4)
    a, b = gates.sigmoid().chunk(2, dim=3)  # B, H, F, 1
    bias = (a * (b * attention.gru_rel_pos_const - 1.0) + 2.0) * bias
    bias = bias.masked_fill(~valid[:, None, None], -math.inf)
    q, k, v = (
        heads(project(x)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    dropout = attention.dropout if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout)
    return attention.out_proj(out.transpose(1, 2).flatten(2))
