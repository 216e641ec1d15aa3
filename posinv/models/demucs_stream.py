"""Causal DEMUCS on a stream: chunks in, chunks out, the samples of the whole recording.

Every part of the network is kept exact across chunks: the sinc resampling keeps its past and waits
for its look-ahead, the convolutions and transposed convolutions keep their overlaps, and the LSTM
keeps its state. What a stream cannot know is the standard deviation of the whole recording, by
which :class:`~posinv.models.demucs.Demucs` divides its input; see :class:`DemucsStream`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posinv.errors import InputError
from posinv.models.demucs import FLOOR, KERNEL_SIZE, ZERO_CROSSINGS, Demucs

ENDED = "the stream has ended (flush): make a new one"
MEMORY = 160_000  # samples, 10 s: the time constant of the running level


class DemucsStream:
    """A causal DEMUCS for signals that arrive in chunks.

    ``stream(chunk)`` returns the samples that are ready, ``stream.flush()`` the rest. Together they
    are as many as went in. Their values do not depend on where the chunks are cut.

    The level: the network hears each sample divided by ``FLOOR`` plus a level, and its output is
    multiplied by the level. :class:`~posinv.models.demucs.Demucs` takes the standard deviation of
    the whole recording, which is unknown until it ends. A stream takes one of these:

    - ``level``, a number. With the recording's standard deviation, all output samples equal those
      of :class:`~posinv.models.demucs.Demucs` for the whole recording.
    - The running level, :class:`RunningLevel`, by default. The output is then what the network
      gives of the whole recording at these levels. It differs from that of
      :class:`~posinv.models.demucs.Demucs` as the levels differ: most at the beginning, and after
      the loudness has changed.

    No gradient is kept. Memory does not grow with the length of the stream.

    Args:
        model: The model; its weights are shared, not copied.
        level: Standard deviation of the signal, above 0, in the unit of its samples; None: the
            running level.
        batch: Number of signals, B, that are enhanced side by side.
        heard_level: Bring the signal to this level before ``FLOOR`` is added, and back afterwards,
            so that scaling the input scales the output; None: the signal goes in as it is.

    Raises:
        InputError: The model is not causal, or the level not a number above 0.
    """

    def __init__(
        self,
        model: Demucs,
        level: float | None = None,
        batch: int = 1,
        heard_level: float | None = None,
    ):
        if not model.causal:
            raise InputError(
                "DEMUCS: it is not causal, its LSTM reads the recording from both ends, so it "
                "cannot stream: take a causal one, or enhance whole files"
            )
        if level is not None and not 0 < level < float("inf"):
            raise InputError(f"level of a stream: {level}, must be a number above 0")
        self._model = model
        self._level = RunningLevel(batch) if level is None else level
        self._heard_level = heard_level
        kernel = model.half_sample_kernel
        empty = kernel.new_zeros(batch, 0)
        halvings = model.resample // 2
        self._waiting = _Queue(empty)  # input that gives no new frame yet
        self._levels = _Queue(empty)
        self._upsamplers = [_Upsampler(kernel, empty) for _ in range(halvings)]
        self._encoder = [_Convolution(block, empty) for block in model.encoder]
        self._skips = [_Queue(empty.new_zeros(batch, _width(b), 0)) for b in model.encoder]
        self._lstm = _LSTM(model.lstm.lstm, empty)
        self._decoder = [_TransposedConvolution(block, empty) for block in model.decoder]
        self._downsamplers = [_Downsampler(kernel, empty) for _ in range(halvings)]
        self._received = self._given = self._frames = 0
        self._ended = False

    @property
    def latency(self) -> int:
        """Samples that must follow a sample, at most, before its output is given.

        763 samples (47.7 ms at 16 kHz) for the options of the released causal models. The
        convolutions take 2,388 samples at 64 kHz, 597 at 16 kHz, for a frame of the LSTM; the
        resampling filters wait for the rest. Output comes a frame at a time: 256 samples (16 ms).
        """
        return max(self._last_input_of(n) - n for n in range(self._frame_shift))

    @torch.no_grad()
    def __call__(self, chunk: Tensor) -> Tensor:
        """Take a chunk ``(B, t)``, t >= 0; return the samples that are ready, ``(B, t')``.

        Raises:
            InputError: another shape or type than the model's, or the stream has ended.
        """
        self._check(chunk)
        levels = self._levels_of(chunk)
        self._levels.push(levels)
        floor: Tensor | float = FLOOR
        if self._heard_level is not None:
            floor = FLOOR / self._heard_level * levels
        divisor = levels + floor
        # Where the level is 0, so are the samples.
        self._waiting.push(chunk / divisor.masked_fill(divisor == 0, 1))
        self._received += chunk.shape[1]
        if self._received <= self._last_input(self._last_sample(self._frames)):
            return chunk[:, :0]
        return self._advance(self._waiting.pop(len(self._waiting)))

    @torch.no_grad()
    def flush(self) -> Tensor:
        """End the stream; return the samples that are left, ``(B, t)``."""
        if self._ended:
            raise InputError(ENDED)
        self._ended = True
        left = self._received - self._given
        if not left:
            return self._waiting.pop(0)
        wave = self._waiting.pop(len(self._waiting))
        padded = int(self._model.padded_lengths(torch.tensor(self._received)))
        wave = F.pad(wave, (0, padded - self._received))
        return self._advance(wave, last=True, most=left)

    def _check(self, chunk: Tensor) -> None:
        if self._ended:
            raise InputError(ENDED)
        waiting = self._waiting.held
        if chunk.dim() != 2 or len(chunk) != len(waiting) or chunk.dtype != waiting.dtype:
            raise InputError(
                f"chunk of a stream: {chunk.dtype} of shape {tuple(chunk.shape)}, expected "
                f"{waiting.dtype} of shape ({len(waiting)}, samples)"
            )

    def _levels_of(self, chunk: Tensor) -> Tensor:
        if isinstance(self._level, RunningLevel):
            return self._level(chunk)
        return torch.full_like(chunk, self._level)

    def _advance(self, wave: Tensor, last: bool = False, most: int | None = None) -> Tensor:
        """Send normalised samples through the network; ``last``: nothing follows them."""
        for upsampler in self._upsamplers:
            wave = upsampler.push(wave, last)
        x = wave.unsqueeze(1)
        for block, skips in zip(self._encoder, self._skips, strict=True):
            x = block.push(x)
            skips.push(x)
        if x.shape[-1]:
            self._frames += x.shape[-1]
            x = self._lstm.push(x)
        for transposed, skips in zip(self._decoder, reversed(self._skips), strict=True):
            x = transposed.push(x + skips.pop(x.shape[-1]), last)
        wave = x.squeeze(1)
        for downsampler in self._downsamplers:
            wave = downsampler.push(wave, last)
        wave = wave[:, :most]
        self._given += wave.shape[1]
        return wave * self._levels.pop(wave.shape[1])

    @property
    def _frame_shift(self) -> int:
        """Samples of the network, at ``resample`` times the rate, from one frame to the next."""
        return self._model.stride ** len(self._encoder)

    def _last_sample(self, frame: int) -> int:
        """Last sample of the network that a frame of its LSTM needs."""
        needed = 0
        for _ in self._encoder:
            needed = needed * self._model.stride + KERNEL_SIZE - 1
        return frame * self._frame_shift + needed

    def _last_input(self, sample: int) -> int:
        """Last input sample that a sample of the network waits for."""
        for _ in self._upsamplers:
            sample = sample // 2 + ZERO_CROSSINGS
        return sample

    def _last_input_of(self, output: int) -> int:
        """Last input sample that an output sample waits for."""
        sample = output
        for _ in self._downsamplers:
            sample = 2 * (sample + ZERO_CROSSINGS) - 1
        return self._last_input(self._last_sample(sample // self._frame_shift))


class RunningLevel:
    """Root mean square of a signal so far, an exponential average: old samples fade out.

    A sample has ``exp(-1 / memory)`` of the weight of the next. At the start the weights are
    divided by their sum, so that the level of n samples, n well below ``memory``, is their plain
    root mean square.

    Args:
        batch: Number of signals, B.
        memory: Time constant in samples.
    """

    def __init__(self, batch: int = 1, memory: int = MEMORY):
        self._memory = memory
        self._energy = torch.zeros(batch, 1, dtype=torch.float64)
        self._count = 0

    def __call__(self, chunk: Tensor) -> Tensor:
        """Return the level at each sample of a chunk, the sample included; both ``(B, t)``."""
        self._energy = self._energy.to(chunk.device)
        levels = [self._levels(part) for part in chunk.split(self._memory, dim=1) if part.numel()]
        return torch.cat(levels, dim=1).to(chunk.dtype) if levels else chunk

    def _levels(self, chunk: Tensor) -> Tensor:
        number = torch.arange(
            1, chunk.shape[1] + 1, dtype=self._energy.dtype, device=self._energy.device
        )
        fading = torch.exp(-number / self._memory)
        squares = chunk.to(self._energy.dtype).square()
        energy = fading * (self._energy + (squares / fading).cumsum(1))
        self._energy = energy[:, -1:].clone()
        weights = torch.expm1(-(self._count + number) / self._memory) / torch.expm1(
            torch.tensor(-1 / self._memory, dtype=number.dtype, device=number.device)
        )
        self._count += chunk.shape[1]
        return (energy / weights).sqrt()


class _Queue:
    """What waits, (B, ..., T): in at the end, out at the front."""

    def __init__(self, held: Tensor):
        self.held = held

    def __len__(self) -> int:
        return self.held.shape[-1]

    def push(self, x: Tensor) -> None:
        self.held = torch.cat([self.held, x], dim=-1)

    def pop(self, count: int) -> Tensor:
        out = self.held[..., :count]
        # A view would keep all of a long chunk.
        self.held = self.held[..., count:].clone()
        return out


class _HalfSamples:
    """The samples half-way between those that come; the past before the first is zero.

    Args:
        kernel: (1, 1, taps).
        before: how many of the taps lie before the place that is interpolated, but for one.
        empty: (B, 0).
    """

    def __init__(self, kernel: Tensor, before: int, empty: Tensor):
        self._kernel = kernel
        self._after = kernel.shape[-1] - 1 - before
        self._past = _Queue(F.pad(empty, (before, 0)))

    def push(self, wave: Tensor, last: bool) -> Tensor:
        self._past.push(F.pad(wave, (0, self._after)) if last else wave)
        ready = len(self._past) - self._kernel.shape[-1] + 1
        if ready < 1:
            return wave[:, :0]
        taps = self._past.held
        self._past.pop(ready)
        return F.conv1d(taps.unsqueeze(1), self._kernel).squeeze(1)


class _Upsampler:
    """:meth:`Demucs._upsample`."""

    def __init__(self, kernel: Tensor, empty: Tensor):
        self._between = _HalfSamples(kernel, ZERO_CROSSINGS - 1, empty)
        self._samples = _Queue(empty)

    def push(self, wave: Tensor, last: bool) -> Tensor:
        self._samples.push(wave)
        between = self._between.push(wave, last)
        samples = self._samples.pop(between.shape[1])
        return torch.stack([samples, between], dim=-1).flatten(1)


class _Downsampler:
    """:meth:`Demucs._downsample`."""

    def __init__(self, kernel: Tensor, empty: Tensor):
        self._between = _HalfSamples(kernel, ZERO_CROSSINGS, empty)
        self._pairs = _Queue(empty)
        self._even = _Queue(empty)

    def push(self, wave: Tensor, last: bool) -> Tensor:
        self._pairs.push(wave)
        if last:
            self._pairs.push(wave.new_zeros(len(wave), len(self._pairs) % 2))
        pairs = self._pairs.pop(len(self._pairs) // 2 * 2)
        self._even.push(pairs[:, ::2])
        between = self._between.push(pairs[:, 1::2], last)
        return (self._even.pop(between.shape[1]) + between) / 2


class _Convolution:
    """A block of the encoder."""

    def __init__(self, block: nn.Module, empty: Tensor):
        assert isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv1d)
        self._block = block
        self._stride = block[0].stride[0]
        self._past = _Queue(empty.new_zeros(len(empty), block[0].in_channels, 0))

    def push(self, x: Tensor) -> Tensor:
        self._past.push(x)
        frames = (len(self._past) - KERNEL_SIZE) // self._stride + 1
        if frames < 1:
            return x.new_zeros(len(x), _width(self._block), 0)
        taps = self._past.held
        self._past.pop(frames * self._stride)
        return self._block(taps)


class _LSTM:
    """The layers of the middle, (B, C, F) to (B, C, F).

    Frame by frame: torch's LSTM on a CPU brings its weights into another order at each call, which
    for the released models takes longer than a frame lasts (16 ms).
    """

    def __init__(self, lstm: nn.LSTM, empty: Tensor):
        self._lstm = lstm
        zeros = empty.new_zeros(len(empty), lstm.hidden_size)
        self._states = [(zeros, zeros) for _ in range(lstm.num_layers)]

    def push(self, x: Tensor) -> Tensor:
        frames = []
        for frame in x.unbind(-1):
            for layer, weights in enumerate(self._lstm.all_weights):
                self._states[layer] = torch.lstm_cell(frame, self._states[layer], *weights)
                frame, _ = self._states[layer]
            frames.append(frame)
        return torch.stack(frames, dim=-1)


class _TransposedConvolution:
    """A block of the decoder."""

    def __init__(self, block: nn.Module, empty: Tensor):
        assert isinstance(block, nn.Sequential) and isinstance(block[2], nn.ConvTranspose1d)
        self._mix, self._transposed, self._activation = block[:2], block[2], block[3:]
        self._stride = block[2].stride[0]
        # What the frames so far add to the samples after theirs, without the bias.
        self._tail = empty.new_zeros(len(empty), block[2].out_channels, KERNEL_SIZE - self._stride)

    def push(self, x: Tensor, last: bool) -> Tensor:
        weight, bias = self._transposed.weight, self._transposed.bias
        assert bias is not None
        y = F.pad(self._tail, (0, x.shape[-1] * self._stride))
        if x.shape[-1]:
            y = y + F.conv_transpose1d(self._mix(x), weight, stride=self._stride)
        if not last:
            ready = x.shape[-1] * self._stride
            y, self._tail = y[..., :ready], y[..., ready:].clone()
        return self._activation(y + bias[:, None])


def _width(block: nn.Module) -> int:
    """Channels that a block of the encoder gives."""
    assert isinstance(block, nn.Sequential) and isinstance(block[2], nn.Conv1d)
    return block[2].out_channels // 2
