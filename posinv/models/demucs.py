"""DEMUCS for speech enhancement: waveform to waveform; padding has no effect.

A. Défossez, G. Synnaeve and Y. Adi, "Real Time Speech Enhancement in the Waveform Domain",
Interspeech 2020, as its authors released it. The options of the released models:

==============  ======  ======  ======  ========
release         hidden  causal  stride  resample
==============  ======  ======  ======  ========
dns48           48      true    4       4
dns64           64      true    4       4
master64        64      true    4       4
valentini_nc    64      false   2       2
==============  ======  ======  ======  ========
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from posinv.data.checkpoint import read_checkpoint
from posinv.errors import InputError
from posinv.lengths import zero_beyond

KERNEL_SIZE = 8
ZERO_CROSSINGS = 56
FLOOR = 1e-3
INIT_STD = 0.1


class Demucs(nn.Module):
    """Causal or non-causal DEMUCS.

    The output for an utterance in a padded batch is the same as for the utterance alone, and as
    that of the released model for the utterance alone.

    Args:
        hidden: Channels of the first encoder block; every further block doubles them.
        depth: Number of encoder blocks, and of decoder blocks.
        stride: Stride of every block, 1 to 8 samples.
        resample: Factor of the sinc upsampling before the network, undone after it: 1, 2 or 4.
        causal: A unidirectional LSTM in the middle; else a bidirectional one and a linear layer.
        checkpoint: File of a released model; see :func:`read_release`. Its state dict holds
            neither ``stride`` nor ``resample``: give those that it was trained with.

    Raises:
        InputError: An option out of range; a file that is missing, is not a checkpoint, or has
            other shapes than the options.
    """

    half_sample_kernel: Tensor

    def __init__(
        self,
        hidden: int = 64,
        depth: int = 5,
        stride: int = 4,
        resample: int = 4,
        causal: bool = True,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        if hidden < 1 or depth < 1:
            raise InputError(
                f"DEMUCS: hidden is {hidden} and depth {depth}, both must be at least 1"
            )
        if not 1 <= stride <= KERNEL_SIZE:
            raise InputError(f"DEMUCS: stride is {stride}, not in 1 to {KERNEL_SIZE}")
        if resample not in (1, 2, 4):
            raise InputError(f"DEMUCS: resample is {resample}, not 1, 2 or 4")
        self.stride = stride
        self.resample = resample
        self.causal = causal

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
        decoder = [
            nn.Sequential(
                nn.Conv1d(inner, 2 * inner, 1),
                nn.GLU(dim=1),
                nn.ConvTranspose1d(inner, outer, KERNEL_SIZE, stride),
                nn.ReLU(),
            )
            for outer, inner in reversed(list(pairwise(channels)))
        ]
        decoder[-1].pop(3)  # the output can be negative
        self.decoder = nn.ModuleList(decoder)
        self.register_buffer("half_sample_kernel", _half_sample_kernel(), persistent=False)
        self._rescale_convolutions()
        if checkpoint is not None:
            self.load_release(read_release(checkpoint), checkpoint)

    def forward(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Enhance a padded batch.

        Args:
            waves: (B, T); samples beyond the lengths are not read.
            lengths: (B,) int, in samples, 1 to T.

        Returns:
            The enhanced waveforms (B, T), zero beyond each length.
        """
        lengths_there, lengths = lengths.to(waves.device), lengths.cpu()
        wave = zero_beyond(waves, lengths)
        std = _std(wave, lengths_there)  # B, 1
        wave = wave / (FLOOR + std)

        extents = self.padded_lengths(lengths)
        # F.pad crops where the batch is padded further than the network asks for.
        wave = F.pad(wave, (0, int(extents.max()) - wave.shape[-1]))
        for _ in range(self.resample // 2):
            wave = self._upsample(wave)
            extents = 2 * extents
            wave = zero_beyond(wave, extents)

        # extents are the lengths that utterances alone would have here. Values beyond them come
        # from biases. They affect values within only in the decoder and the resampling, where they
        # are set to zero.
        x = wave.unsqueeze(1)  # B, 1, T'
        skips = []
        for block in self.encoder:
            x = block(x)
            extents = (extents - KERNEL_SIZE) // self.stride + 1
            skips.append(x)
        x = self.lstm(x, extents)
        for block in self.decoder:
            assert isinstance(block, nn.Sequential)
            x = x + skips.pop()[..., : x.shape[-1]]
            x = zero_beyond(block[:2](x), extents)
            x = block[2:](x)
            extents = (extents - 1) * self.stride + KERNEL_SIZE
        wave = zero_beyond(x.squeeze(1), extents)

        for _ in range(self.resample // 2):
            wave = self._downsample(wave)
            extents = (extents + 1) // 2
            wave = zero_beyond(wave, extents)
        wave = F.pad(wave, (0, waves.shape[-1] - wave.shape[-1]))
        return zero_beyond(std * wave, lengths)

    def padded_lengths(self, lengths: Tensor) -> Tensor:
        """Return the least lengths >= ``lengths``, (B,), that convolutions use to the last sample.

        Recordings are zero-padded to them.
        """
        frames = lengths * self.resample
        for _ in self.encoder:
            frames = (_ceil_div(frames - KERNEL_SIZE, self.stride) + 1).clamp(min=1)
        for _ in self.decoder:
            frames = (frames - 1) * self.stride + KERNEL_SIZE
        return _ceil_div(frames, self.resample)

    def _upsample(self, wave: Tensor) -> Tensor:
        """(B, T) to (B, 2T): the samples, and between them sinc-interpolated ones."""
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
                assert module.bias is not None
                scale = (module.weight.std() / INIT_STD).sqrt()
                module.weight /= scale
                module.bias /= scale

    def load_release(self, state: Mapping[str, Tensor], path: Path | str) -> None:
        """Load a released model's state dict; see :func:`read_release`.

        Raises:
            InputError: It is not of a DEMUCS, or of one with other options.
        """
        if "encoder.0.0.weight" not in state:
            raise InputError(
                f"{path}: not the state dict of a DEMUCS (tensors, 'encoder.0.0.weight' among "
                "them); for a model that ESPnet trained give --init_param instead"
            )
        own = self.state_dict()
        for key in [*own, *state]:
            theirs, ours = (
                tuple(found[key].shape) if key in found else "absent" for found in (state, own)
            )
            if theirs != ours:
                blocks = sum(name.startswith("encoder.") for name in state) // 4
                raise InputError(
                    f"{path}: {key} is {theirs} in the file but {ours} in this model; the "
                    f"file seems to have hidden={len(state['encoder.0.0.weight'])}, "
                    f"depth={blocks}, causal={'lstm.linear.weight' not in state}"
                )
        self.load_state_dict(state)


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
    deviation = zero_beyond(wave - mean, lengths.squeeze(1))
    variance = deviation.square().sum(dim=1, keepdim=True) / (lengths - 1).clamp(min=1)
    # The square root has no gradient at 0.
    return torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)


def _ceil_div(a: Tensor, b: int) -> Tensor:
    return (a + b - 1) // b


def read_release(path: Path | str) -> dict[str, Tensor]:
    """Return the state dict in a released file.

    Args:
        path: A model of the release, which is a state dict, or the ``best.th`` that its training
            writes, which has the state dict as an entry.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    # best.th also has the model's class, by its name: an empty class takes its place.
    stand_in = type("Demucs", (), {})
    with torch.serialization.safe_globals([(stand_in, "denoiser.demucs.Demucs")]):
        content = read_checkpoint(path)
    for wrapping in ("best_state", "model", "state"):
        if isinstance(content, dict) and wrapping in content:
            content = content[wrapping]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(
            f"{path}: not a state dict: give a model of the release, or the best.th that its "
            "training writes"
        )
    return content
