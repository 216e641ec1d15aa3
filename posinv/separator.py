"""DEMUCS for speech as an ESPnet separator: waveform to waveform, an exact batch.

A. Défossez, G. Synnaeve and Y. Adi, "Real Time Speech Enhancement in the Waveform Domain",
Interspeech 2020, as its authors released it. The released models by their options here:

==============  ======  ======  ======  ========
release         hidden  causal  stride  resample
==============  ======  ======  ======  ========
dns48           48      true    4       4
dns64           64      true    4       4
master64        64      true    4       4
valentini_nc    64      false   2       2
==============  ======  ======  ======  ========
"""

import pickle
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from espnet2.enh.separator.abs_separator import AbsSeparator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from posinv.errors import InputError
from posinv.lengths import valid_mask

KERNEL_SIZE = 8
ZERO_CROSSINGS = 56
FLOOR = 1e-3
INIT_STD = 0.1


class DemucsSeparator(AbsSeparator):
    """Causal or non-causal DEMUCS over ESPnet's ``same`` encoder and decoder.

    An utterance in a padded batch gives what it gives alone, and what the released model
    gives for it alone.

    Args:
        input_dim: Output dimension of the encoder, 1 for ``same``.
        num_spk: Number of output signals; only 1.
        hidden: Channels of the first encoder block; every further block doubles them.
        depth: Number of encoder blocks, and of decoder blocks.
        stride: Stride of every block, 1 to 8 samples.
        resample: Sinc upsampling before the network, undone after it: 1, 2 or 4.
        causal: LSTM in the middle; else a bidirectional LSTM with a linear layer.
        checkpoint: File of a released model: its state dict, bare or as ``best.th`` wraps it.
            The state dict holds neither ``stride`` nor ``resample``: give them as trained.

    Raises:
        InputError: An option out of range; a checkpoint that is missing, is none, or has
            other shapes than the options ask for.
    """

    def __init__(
        self,
        input_dim: int,
        num_spk: int = 1,
        hidden: int = 64,
        depth: int = 5,
        stride: int = 4,
        resample: int = 4,
        causal: bool = True,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        if input_dim != 1:
            raise InputError(
                f"DemucsSeparator: input_dim is {input_dim}, but it takes waveforms: "
                "set 'encoder: same' and 'decoder: same'"
            )
        if num_spk != 1:
            raise InputError(f"DemucsSeparator: num_spk is {num_spk}, only 1 is possible")
        if hidden < 1 or depth < 1:
            raise InputError(
                f"DemucsSeparator: hidden is {hidden} and depth {depth}, both must be at least 1"
            )
        if not 1 <= stride <= KERNEL_SIZE:
            raise InputError(f"DemucsSeparator: stride is {stride}, not in 1 to {KERNEL_SIZE}")
        if resample not in (1, 2, 4):
            raise InputError(f"DemucsSeparator: resample is {resample}, not 1, 2 or 4")
        self._num_spk = num_spk
        self.stride = stride
        self.resample = resample

        channels = [1] + [hidden * 2**block for block in range(depth)]
        self.encoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(outer, inner, KERNEL_SIZE, stride),
                nn.ReLU(),
                nn.Conv1d(inner, 2 * inner, 1),
                nn.GLU(dim=1),
            )
            for outer, inner in pairwise(channels)
        )
        self.lstm = _Bottleneck(channels[-1], causal)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(inner, 2 * inner, 1),
                nn.GLU(dim=1),
                nn.ConvTranspose1d(inner, outer, KERNEL_SIZE, stride),
                nn.ReLU(),
            )
            for outer, inner in reversed(list(pairwise(channels)))
        )
        self.decoder[-1].pop(3)  # the output takes either sign
        self.register_buffer("half_sample_kernel", _half_sample_kernel(), persistent=False)
        self._rescale_convolutions()
        if checkpoint is not None:
            self._load(Path(checkpoint))

    @property
    def num_spk(self) -> int:
        """Number of output signals: 1."""
        return self._num_spk

    def forward(
        self, input: Tensor, ilens: Tensor, additional: dict | None = None
    ) -> tuple[list[Tensor], Tensor, OrderedDict]:
        """Enhance a padded batch.

        Args:
            input: Waveforms, (B, T); what lies beyond a length is not looked at.
            ilens: Lengths in samples, (B,), 1 to T.
            additional: Not used.

        Returns:
            The enhanced waveforms, [(B, T)], zero beyond each length; ``ilens``; no others.

        Raises:
            InputError: ``input`` has channels.
        """
        if input.dim() != 2:
            raise InputError(
                f"DemucsSeparator: input of shape {tuple(input.shape)}, expected one channel: "
                "(batch, samples)"
            )
        lengths = ilens.cpu()
        wave = _zero_beyond(input, lengths)
        std = _std(wave, ilens)  # B, 1
        wave = wave / (FLOOR + std)

        extents = self._padded_lengths(lengths)
        # F.pad crops where the batch is padded further than the network asks for.
        wave = F.pad(wave, (0, int(extents.max()) - wave.shape[-1]))
        for _ in range(self.resample // 2):
            wave = self._upsample(wave)
            extents = 2 * extents
            wave = _zero_beyond(wave, extents)

        # `extents` is what an utterance alone would have at each point. Beyond it there are
        # sums of biases; they reach back into it in the decoder and the resampling only.
        x = wave.unsqueeze(1)  # B, 1, T'
        skips = []
        for block in self.encoder:
            x = block(x)
            extents = (extents - KERNEL_SIZE) // self.stride + 1
            skips.append(x)
        x = self.lstm(x, extents)
        for block in self.decoder:
            x = x + skips.pop()[..., : x.shape[-1]]
            x = _zero_beyond(block[:2](x), extents)
            x = block[2:](x)
            extents = (extents - 1) * self.stride + KERNEL_SIZE
        wave = _zero_beyond(x.squeeze(1), extents)

        for _ in range(self.resample // 2):
            wave = self._downsample(wave)
            extents = (extents + 1) // 2
            wave = _zero_beyond(wave, extents)
        wave = F.pad(wave, (0, input.shape[-1] - wave.shape[-1]))
        return [_zero_beyond(std * wave, lengths)], ilens, OrderedDict()

    def _padded_lengths(self, lengths: Tensor) -> Tensor:
        """Shortest lengths, (B,), at which no convolution leaves samples over."""
        frames = lengths * self.resample
        for _ in self.encoder:
            frames = (_ceil_div(frames - KERNEL_SIZE, self.stride) + 1).clamp(min=1)
        for _ in self.decoder:
            frames = (frames - 1) * self.stride + KERNEL_SIZE
        return _ceil_div(frames, self.resample)

    def _upsample(self, wave: Tensor) -> Tensor:
        """(B, T) to (B, 2T): the samples, and between them what the sinc kernel gives."""
        between = self._interpolate(wave, ZERO_CROSSINGS - 1)
        return torch.stack([wave, between], dim=-1).flatten(1)

    def _downsample(self, wave: Tensor) -> Tensor:
        """(B, T) to (B, ceil(T / 2)): the half-band filter of :meth:`_upsample`, decimated."""
        wave = F.pad(wave, (0, wave.shape[-1] % 2))
        return (wave[:, ::2] + self._interpolate(wave[:, 1::2], ZERO_CROSSINGS)) / 2

    def _interpolate(self, wave: Tensor, before: int) -> Tensor:
        padding = (before, 2 * ZERO_CROSSINGS - 1 - before)
        return F.conv1d(F.pad(wave, padding).unsqueeze(1), self.half_sample_kernel).squeeze(1)

    @torch.no_grad()
    def _rescale_convolutions(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                scale = (module.weight.std() / INIT_STD).sqrt()
                module.weight /= scale
                module.bias /= scale

    def _load(self, path: Path) -> None:
        loaded = _read_state_dict(path)
        own = self.state_dict()
        for key in [*own, *loaded]:
            theirs, ours = (
                tuple(state[key].shape) if key in state else "absent" for state in (loaded, own)
            )
            if theirs != ours:
                blocks = sum(name.startswith("encoder.") for name in loaded) // 4
                raise InputError(
                    f"{path}: {key} is {theirs} in the file but {ours} in this separator; the "
                    f"file seems to have hidden={len(loaded['encoder.0.0.weight'])}, "
                    f"depth={blocks}, causal={'lstm.linear.weight' not in loaded}"
                )
        self.load_state_dict(loaded)


class _Bottleneck(nn.Module):
    """Two LSTM layers, (B, C, F) to (B, C, F); bidirectional and projected if not causal."""

    def __init__(self, channels: int, causal: bool):
        super().__init__()
        self.lstm = nn.LSTM(
            channels, channels, num_layers=2, batch_first=True, bidirectional=not causal
        )
        self.linear = None if causal else nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # B, F, C
        if self.linear is None:
            x, _ = self.lstm(x)
        else:
            packed = pack_padded_sequence(x, frames, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
            x = self.linear(x)
        return x.transpose(1, 2)


def _half_sample_kernel() -> Tensor:
    """Hann-windowed sinc at -55.5, -54.5, ..., 55.5 samples, (1, 1, 112)."""
    time = torch.arange(-ZERO_CROSSINGS, ZERO_CROSSINGS, dtype=torch.float64) + 0.5
    window = torch.cos(torch.pi * time / (2 * ZERO_CROSSINGS)) ** 2
    return (torch.sinc(time) * window).to(torch.get_default_dtype()).view(1, 1, -1)


def _std(wave: Tensor, lengths: Tensor) -> Tensor:
    """Standard deviation (unbiased) of zero-padded waveforms, (B, 1); 0 for one sample."""
    lengths = lengths.unsqueeze(1)
    mean = wave.sum(dim=1, keepdim=True) / lengths
    deviation = _zero_beyond(wave - mean, lengths.squeeze(1))
    variance = deviation.square().sum(dim=1, keepdim=True) / (lengths - 1).clamp(min=1)
    # The square root has no gradient at 0.
    return torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)


def _zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """`x`, (B, ..., T), with zeros from each length on."""
    beyond = ~valid_mask(lengths, x.shape[-1], x.device)
    return x.masked_fill(beyond if x.dim() == 2 else beyond.unsqueeze(1), 0.0)


def _ceil_div(a: Tensor, b: int) -> Tensor:
    return (a + b - 1) // b


class _ReleasedClass:
    """Stands for the model class that the release's training writes into ``best.th``."""


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """State dict of a released file, bare or in the release's wrappings."""
    # The release's training writes the state dict beside the model's class, of which nothing
    # but the name is in the file.
    released_class = [(_ReleasedClass, "denoiser.demucs.Demucs")]
    try:
        with torch.serialization.safe_globals(released_class):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot read the DEMUCS checkpoint: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not a file of tensors that torch can load (weights_only): give a DEMUCS "
            "state dict, as the release's models are, or the best.th its training writes; "
            "a checkpoint.th holds Python objects besides"
        ) from error
    for wrapping in ("best_state", "model", "state"):
        if isinstance(content, dict) and wrapping in content:
            content = content[wrapping]
    if (
        not isinstance(content, dict)
        or "encoder.0.0.weight" not in content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise InputError(
            f"{path}: not the state dict of a DEMUCS (tensors, 'encoder.0.0.weight' among them); "
            "for a model that ESPnet trained give --init_param instead"
        )
    return content
