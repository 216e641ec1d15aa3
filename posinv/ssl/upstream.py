"""Self-supervised (SSL) speech models, batched so that padding changes nothing."""

import logging
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from posinv.errors import InputError
from posinv.lengths import Lengths
from posinv.ssl import load
from posinv.ssl.exact import extract


class SSLUpstream(nn.Module):
    """An SSL speech model: the hidden states of a padded batch.

    ``(waves (B, T), lengths (B,))`` gives ``(hidden (L + 1, B, F, D), frame_lengths (B,))``. For
    each utterance, ``hidden[i]`` equals ``hidden_states[i]`` of ``transformers`` for that utterance
    alone, and is zero past its end. See :func:`~posinv.ssl.exact.extract`.

    Parameters are frozen unless their names match ``trainable``, see
    :func:`~posinv.ssl.load.set_trainable`. Modules without trainable parameters stay in eval mode,
    also after ``train()``, unless ``dropout`` is ``all``. The model itself is :attr:`model`.

    Args:
        name_or_path: A local folder or a Hugging Face hub name.
        random_init: Draw the weights from torch's generator instead of loading them; a folder
            then needs only a ``config.json``.
        trainable: Shell-style patterns over the parameter names of :attr:`model`, for example
            ``encoder.layers.10.*``.
        normalize: Bring each utterance to zero mean and unit variance. None: what the model's
            ``preprocessor_config.json`` says in ``do_normalize``, False where there is none.
        dropout: Where ``train()`` turns dropout on: ``trained``, in modules with trainable
            parameters; ``all``, in all modules, as S3PRL does.

    Raises:
        InputError: The model cannot be loaded, a pattern matches no parameter, or another
            ``dropout``.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        random_init: bool = False,
        trainable: Sequence[str] = (),
        normalize: bool | None = None,
        dropout: str = "trained",
    ):
        super().__init__()
        if dropout not in ("trained", "all"):
            raise InputError(f"dropout must be trained or all: {dropout!r}")
        self.dropout = dropout
        config = load.load_config(name_or_path)
        self.model = load.load_model(name_or_path, config, random_init)
        self.normalize = load.reads_normalized(name_or_path) if normalize is None else normalize
        load.set_trainable(self.model, trainable)
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
        return load.hop(self.config)

    @property
    def min_samples(self) -> int:
        """The shortest utterance, one frame, in samples."""
        return load.min_samples(self.config)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames that ``lengths`` samples (int tensor) give."""
        return load.frame_lengths(self.config, lengths)

    def check_layer(self, layer: int | None) -> int:
        """Return the index of a hidden state; see :func:`~posinv.ssl.load.check_layer`."""
        return load.check_layer(self.config, layer)

    def train(self, mode: bool = True) -> "SSLUpstream":
        """Set the training mode of the modules that ``dropout`` names; others stay in eval mode."""
        super().train(mode and self.dropout == "all")
        if mode and self.dropout == "trained":
            load.train_where_trainable(self.model)
        return self

    def forward(
        self, waves: Tensor, lengths: Lengths, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return one hidden state, or all of them, and the frame lengths.

        Args:
            waves: (B, T) floating point, 16 kHz.
            lengths: (B,) int, in samples, from :attr:`min_samples` to T.
            layer: 0 to L, or -1 for the last: that hidden state alone. None for all.

        Returns:
            ``(B, F, D)``, or ``(L + 1, B, F, D)`` for all, and ``(B,)``; F is the longest
            utterance's frames.

        Raises:
            InputError: See :func:`~posinv.ssl.exact.extract`.
        """
        return extract(self.model, waves, lengths, self.normalize, layer=layer)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the model as a folder; see :func:`~posinv.ssl.load.save_pretrained`."""
        load.save_pretrained(self.model, directory, self.normalize)


class Frozen:
    """A frozen module that is hidden from the ``nn.Module`` that holds it.

    It is not among its holder's parameters nor in its checkpoints, and the holder's ``to()`` and
    ``train()`` do not reach it. It is in eval mode; its parameters get no gradient, its input may.
    It moves to its input's device.

    Args:
        module: The module, also :attr:`module`.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the module; if it is on another device than ``x``, move it there first."""
        held = next(chain(self.module.parameters(), self.module.buffers()), None)
        if held is not None and held.device != x.device:
            self.module.to(x.device)
        return self.module(x, *args, **kwargs)
