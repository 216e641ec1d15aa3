"""The BLSTM of SUPERB's speech recogniser as an ESPnet encoder."""

from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BLSTMEncoder(AbsEncoder):
    """``blstm``: bidirectional LSTM layers, dropout after each, as in S3PRL's ``downstream/asr``.

    ESPnet's ``rnn`` adds a linear layer with a tanh, and has no dropout after its last layer.

    Args:
        input_size: feature dimension.
        hidden_size: size of each direction.
        num_layers: number of layers.
        dropout: dropout probability after each layer.
    """

    def __init__(
        self, input_size: int, hidden_size: int = 1024, num_layers: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.blstm = nn.LSTM(
            input_size,
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
            The outputs ``(B, max(ilens), 2 * hidden_size)``, the frame counts ``(B,)``, and None.
        """
        packed = pack_padded_sequence(xs_pad, ilens.cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.blstm(packed)[0], batch_first=True)
        return self.dropout(x), ilens, None
