"""DEMUCS as an ESPnet separator over ESPnet's ``same`` encoder and decoder."""

from collections import OrderedDict
from pathlib import Path

from espnet2.enh.separator.abs_separator import AbsSeparator
from torch import Tensor

from posinv.errors import InputError
from posinv.models.demucs import Demucs
from posinv.models.demucs_stream import DemucsStream


class DemucsSeparator(Demucs, AbsSeparator):
    """``demucs``: :class:`~posinv.models.demucs.Demucs`, with the same state dict.

    Args:
        input_dim: output dimension of the encoder, 1 for ``same``.
        num_spk: number of output signals; only 1 is possible.
        hidden, depth, stride, resample, causal, checkpoint: see
            :class:`~posinv.models.demucs.Demucs`.

    Raises:
        InputError: an option out of range; a checkpoint whose keys or shapes are not the model's.
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
        if input_dim != 1:
            raise InputError(
                f"DemucsSeparator: input_dim is {input_dim}, but it takes waveforms: "
                "set 'encoder: same' and 'decoder: same'"
            )
        if num_spk != 1:
            raise InputError(f"DemucsSeparator: num_spk is {num_spk}, only 1 is possible")
        super().__init__(hidden, depth, stride, resample, causal, checkpoint)

    @property
    def num_spk(self) -> int:
        """Number of output signals: 1."""
        return 1

    def forward(  # type: ignore[override]  # ESPnet's signature
        self, input: Tensor, ilens: Tensor, additional: dict | None = None
    ) -> tuple[list[Tensor], Tensor, OrderedDict]:
        """Enhance a batch of waveforms.

        Args:
            input: waveforms ``(B, T)``.
            ilens: their lengths ``(B,)`` in samples.
            additional: not used; ESPnet's separators have it.

        Returns:
            The enhanced waveforms ``[(B, T)]``, ``ilens``, and no further outputs.

        Raises:
            InputError: ``input`` has channels.
        """
        if input.dim() != 2:
            raise InputError(
                f"DemucsSeparator: input of shape {tuple(input.shape)}, expected one channel: "
                "(batch, samples)"
            )
        return [super().forward(input, ilens)], ilens, OrderedDict()

    def forward_streaming(
        self, input_frame: Tensor, states: DemucsStream | None = None
    ) -> tuple[list[Tensor], DemucsStream, OrderedDict]:
        """Enhance the next chunk of a stream, with the running level of what has come.

        The samples that come out are not those that went in: they follow after the latency, 763
        samples for the options of the released causal models. After the last chunk,
        ``states.flush()`` gives the rest, ``(B, t)``. A known level, or the latency:
        :class:`~posinv.models.demucs_stream.DemucsStream`.

        ESPnet's ``enh_inference_streaming`` does not run with DEMUCS, since ESPnet's ``same``
        encoder has no streaming; :meth:`posinv.inference.Enhancer.stream` does it.

        Args:
            input_frame: ``(B, t)``, any t.
            states: None for the first chunk, then what the last call returned: the same object,
                which each call changes.

        Returns:
            The samples that are ready, ``[(B, t')]``, the states, and no further outputs.

        Raises:
            InputError: the model is not causal; a chunk of another shape or type.
        """
        if states is None:
            states = DemucsStream(self, batch=len(input_frame))
        return [states(input_frame)], states, OrderedDict()
