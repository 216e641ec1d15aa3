"""The BLSTM of SUPERB's speech recogniser as an ESPnet encoder."""

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
            xs_pad = zero_beyond(xs_pad.transpose(1, 2), ilens).transpose(1, 2)
            batch, frames, size = xs_pad.shape
            xs_pad = nn.functional.pad(xs_pad, (0, 0, 0, -frames % self.stack))
            xs_pad = xs_pad.reshape(batch, -1, self.stack * size)
            ilens = torch.div(ilens + self.stack - 1, self.stack, rounding_mode="floor")
        packed = pack_padded_sequence(xs_pad, ilens.cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.blstm(packed)[0], batch_first=True)
        return self.dropout(x), ilens, None
