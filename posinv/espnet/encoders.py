"""The BLSTM of SUPERB's speech recogniser as an ESPnet encoder."""

from collections.abc import Sequence

import torch
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from posinv.errors import InputError
from posinv.lengths import zero_beyond


class BLSTMEncoder(AbsEncoder):
    """``blstm``: bidirectional LSTM layers, dropout after each, as in S3PRL's ``downstream/asr``.

    ESPnet's ``rnn`` adds a linear layer with a tanh, and has no dropout after its last layer.

    Args:
        input_size: feature dimension.
        hidden_size: size of each direction.
        num_layers: number of layers.
        dropout: dropout probability after each layer.
        stack: consecutive frames that are joined to one before the first layer (S3PRL's
            ``sample_rate`` with ``sample_style: concat``). There are then fewer frames for CTC, and
            less to compute. Zeros complete the last group.

    Raises:
        InputError: ``stack`` is no whole number from 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 1024,
        num_layers: int = 2,
        dropout: float = 0.2,
        stack: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(stack, int) or stack < 1:
            raise InputError(f"encoder_conf: stack: must be a whole number from 1: {stack!r}")
        self.stack = stack
        self.blstm = nn.LSTM(
            stack * input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=True,
        )
        self.dropout = nn.Dropout(dropout)

    def output_size(self) -> int:
        """Return the output dimension, twice ``hidden_size``."""
        return 2 * self.blstm.hidden_size

    def forward(
        self, xs_pad: Tensor, ilens: Tensor, prev_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """Encode a batch. The order of the utterances and the padding don't matter.

        Args:
            xs_pad: features ``(B, F, D)``.
            ilens: frame counts ``(B,)``.
            prev_states: not used; ESPnet's encoders have it.

        Returns:
            The outputs ``(B, max(ilens), 2 * hidden_size)``, the frame counts ``(B,)``, and None;
            with ``stack``, of that many times fewer frames, rounded up.
        """
        if self.stack > 1:
            xs_pad = _zero_frames(xs_pad, ilens)
            batch, frames, size = xs_pad.shape
            xs_pad = nn.functional.pad(xs_pad, (0, 0, 0, -frames % self.stack))
            xs_pad = xs_pad.reshape(batch, -1, self.stack * size)
            ilens = torch.div(ilens + self.stack - 1, self.stack, rounding_mode="floor")
        run = self._run_packed if xs_pad.is_cuda else self._run_padded
        return self.dropout(run(xs_pad, ilens)), ilens, None

    def _run_packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.blstm(packed)[0], batch_first=True)[0]

    def _run_padded(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Run the BLSTM on the CPU, one layer and one direction at a time, with the same result.

        oneDNN does not support packed batches, and without it torch takes 3 to 4 times as long.
        For the backward direction, each utterance is reversed within its length, so that the
        padding stays at the end.
        """
        x = _zero_frames(x[:, : int(lengths.max())], lengths)
        last, frame = lengths[:, None] - 1, torch.arange(x.size(1))
        mirror = torch.where(frame <= last, last - frame, frame)[:, :, None]

        def reverse(x: Tensor) -> Tensor:
            return x.gather(1, mirror.expand(-1, -1, x.size(2)))

        weights = iter(self.blstm.all_weights)
        for layer in range(self.blstm.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.blstm.dropout, self.training)
            forwards = self._lstm(x, next(weights))
            backwards = reverse(self._lstm(reverse(x), next(weights)))
            x = torch.cat([forwards, backwards], dim=2)
        return _zero_frames(x, lengths)

    def _lstm(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the outputs of one layer in one direction."""
        state = x.new_zeros(1, len(x), self.blstm.hidden_size)
        options = (True, 1, 0.0, self.training, False, True)  # biases, layers, dropout, ...
        return torch.lstm(x, (state, state), list(weights), *options)[0]


def _zero_frames(x: Tensor, lengths: Tensor) -> Tensor:
    """Return ``x (B, F, D)`` with zeros beyond the frame counts ``(B,)``."""
    return zero_beyond(x.transpose(1, 2), lengths).transpose(1, 2)
