r"""Self-supervised fine-tuning of an SSL model: an utterance is aligned with its perturbed copy.

LASER (Meghanani & Hain, *LASER: Learning by Aligning Self-supervised Representations of Speech
for Improving Content-related Tasks*, Interspeech 2024, arXiv 2406.09153). Soft-DTW alone,
frame-by-frame MSE, the noise-robust variant (NR-SSFT) and SCORE, which came before (*SCORE:
Self-supervised Correspondence Fine-tuning for Improved Content Representations*, ICASSP 2024), are
configurations of the same model.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posinv.augment.draws import random_state
from posinv.augment.views import Perturbation
from posinv.errors import InputError
from posinv.losses import SSLMSE, ContrastiveIDM
from posinv.losses.functional import effective_rank, frame_distance
from posinv.softdtw import SoftDTWLoss
from posinv.ssl.load import check_layer, hop, load_config
from posinv.ssl.upstream import Frozen, SSLUpstream

LOSSES = ("soft_dtw", "mse")
REFERENCES = ("tuned", "frozen")


_Views = tuple[list[Tensor], Tensor]  # waveforms, and their lengths (B,)


class SSFTModel(nn.Module):
    r"""An SSL model whose last layers learn to give two views of an utterance the same content.

    Each view's features of one layer are projected, :math:`z = \mathrm{L2norm}(W h)`. With x and
    y the two views' z, the loss of a pair is

    .. math:: D_\gamma(x, y) + \alpha (\mathrm{IDM}(x) + \mathrm{IDM}(y))

    where :math:`D_\gamma` is the soft-DTW divergence or, for views of equal length, the sum over
    frames of :math:`\|x_i - y_i\|^2`; see :class:`~posinv.softdtw.SoftDTWLoss` and
    :class:`~posinv.losses.ContrastiveIDM`. A batch's loss is the mean of its pairs' losses, each
    over true lengths. The first view is the utterance itself, the second its perturbed copy.

    Autograd records nothing of the modules before the first trained one.

    Args:
        ssl: the SSL model, a hub name or a folder (see :class:`~posinv.ssl.upstream.SSLUpstream`).
        layer: hidden state that is aligned, 1 to the last, or -1 for the last.
        trainable_layers: number of transformer layers that are trained: the layer that gives
            hidden state ``layer``, and those before it. The rest of the SSL model is frozen.
        trainable: names of the trained parameters instead, shell-style patterns such as
            ``encoder.layers.11.*``.
        dropout: ``trained``, in modules with trained parameters, the others being in eval mode; or
            ``all``, in all modules.
        projection_size: width of z.
        projection_hidden: None for a linear W; or the width of a layer with ReLU between two linear
            ones (SCORE's for WavLM).
        loss: ``soft_dtw`` or ``mse``.
        gamma: smoothing of soft-DTW.
        normalize_length: divide the alignment loss by the sum of the two views' frames (SCORE).
        alpha: weight of the regulariser; 0 leaves it out.
        margin: margin of the regulariser, a Euclidean distance of unit vectors, 0 to 2.
        window: window of the regulariser, in frames.
        reference: the SSL model that the second view goes through: ``tuned``, the one that is
            trained (LASER); or ``frozen``, the SSL model as it was (SCORE). W is shared.
        swap_views: let the perturbed copy be the first view, with probability one half. It has no
            effect but with a frozen reference.
        views: options of :class:`~posinv.augment.views.Perturbation`, which makes the second view.

    Raises:
        InputError: no such model or layer, or an argument out of range.
    """

    def __init__(
        self,
        ssl: str,
        layer: int = -1,
        trainable_layers: int = 2,
        trainable: Sequence[str] | None = None,
        dropout: str = "trained",
        projection_size: int = 256,
        projection_hidden: int | None = None,
        loss: str = "soft_dtw",
        gamma: float = 0.1,
        normalize_length: bool = False,
        alpha: float = 0.0,
        margin: float = 1.1,
        window: int = 0,
        reference: str = "tuned",
        swap_views: bool = False,
        views: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = load_config(ssl)
        self.layer = check_layer(config, layer)
        if not 1 <= trainable_layers <= self.layer:
            raise InputError(
                f"model_conf: trainable_layers must be 1 to {self.layer}, the layers up to the "
                f"aligned one: {trainable_layers}"
            )
        if loss not in LOSSES:
            raise InputError(f"model_conf: loss must be one of {', '.join(LOSSES)}: {loss!r}")
        if loss == "mse" and normalize_length:
            raise InputError("model_conf: normalize_length is for the loss soft_dtw: leave it out")
        if reference not in REFERENCES:
            raise InputError(
                f"model_conf: reference must be one of {', '.join(REFERENCES)}: {reference!r}"
            )
        try:
            self.perturb = Perturbation(**(views or {}), hop=hop(config))
        except TypeError as error:
            raise InputError(f"model_conf: views: {error}") from error
        if loss == "mse" and not self.perturb.keeps_length:
            raise InputError(
                "model_conf: the loss mse needs views of equal length; leave speed and pad out "
                "of views, or take soft_dtw"
            )
        if trainable is None:
            first = self.layer - trainable_layers
            trainable = [f"encoder.layers.{i}.*" for i in range(first, self.layer)]
        self.upstream = SSLUpstream(ssl, trainable=trainable, dropout=dropout)
        for name, parameter in self.upstream.model.named_parameters():
            above = re.match(r"encoder\.layers\.(\d+)\.", name)
            if parameter.requires_grad and above and int(above[1]) >= self.layer:
                raise InputError(
                    f"model_conf: trainable: {name} is above the aligned hidden state "
                    f"{self.layer}, so it would get no gradient: leave it out"
                )
        self.reference = Frozen(SSLUpstream(ssl)) if reference == "frozen" else None
        self.swap_views = swap_views
        size = self.upstream.output_size
        self.projection: nn.Module = nn.Linear(size, projection_size)
        if projection_hidden:
            self.projection = nn.Sequential(
                nn.Linear(size, projection_hidden),
                nn.ReLU(),
                nn.Linear(projection_hidden, projection_size),
            )
        self.alignment = (
            SoftDTWLoss(gamma, normalize_length=normalize_length)
            if loss == "soft_dtw"
            else SSLMSE("sum")
        )
        self.regulariser = ContrastiveIDM(margin, window)
        self.alpha = alpha

    def forward(
        self, speech: Tensor, speech_lengths: Tensor | Sequence[int], utt_id: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss, statistics, and the number of pairs.

        In validation the statistics have the mean
        :func:`~posinv.losses.functional.frame_distance` and
        :func:`~posinv.losses.functional.effective_rank` of the unperturbed utterances: of z, and of
        the SSL features (``ssl_...``).

        Args:
            speech: (B, T) float at 16 kHz.
            speech_lengths: (B,) int, in samples. If they are on the CPU, nothing waits for a GPU.
            utt_id: the utterance ids, on which the views' random draws depend.

        Raises:
            InputError: a view is shorter than one frame.
        """
        speech_lengths = torch.as_tensor(speech_lengths)
        view, view_lengths = self.perturb(speech, speech_lengths, utt_id)
        self._check_lengths(torch.cat([speech_lengths, view_lengths]), utt_id)
        first, second = (list(speech), speech_lengths), (list(view), view_lengths)
        if self.swap_views and self.training:
            first, second = _swapped(first, second, utt_id)
        hidden, frames = self.view_features(first, second)
        x, y = (F.normalize(self.projection(features).float(), dim=2) for features in hidden)

        alignment, regulariser = self.pair_losses(x, y, *frames)
        loss = (alignment + self.alpha * regulariser).mean()
        stats = {
            "loss": loss.detach(),
            "alignment": alignment.detach().mean(),
            "regulariser": regulariser.detach().mean(),
        }
        if not self.training:
            for prefix, features in (("", x), ("ssl_", hidden[0])):
                stats[f"{prefix}frame_distance"] = frame_distance(features, frames[0]).mean()
                stats[f"{prefix}effective_rank"] = effective_rank(features, frames[0]).mean()
        return loss, stats, loss.new_full((), len(speech))

    def view_features(
        self, first: _Views, second: _Views
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the aligned layer's features of two views, and the frames of both.

        Args:
            first: waveforms of each utterance, and their lengths ``(B,)`` in samples.
            second: the other view of the same utterances.
        """
        if self.reference is None:
            waves = nn.utils.rnn.pad_sequence([*first[0], *second[0]], batch_first=True)
            hidden, frames = self.features(waves, torch.cat([first[1], second[1]]))
            return hidden.chunk(2), frames.chunk(2)
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        hidden, frames = self.features(pad(first[0]), first[1])
        with torch.no_grad():
            target, target_frames = self.reference(pad(second[0]), second[1], layer=self.layer)
        return (hidden, target), (frames, target_frames)

    def pair_losses(
        self, x: Tensor, y: Tensor, x_frames: Tensor, y_frames: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the alignment loss and the regulariser, before alpha, of each pair.

        Args:
            x: (B, N, D) projected features of one view, L2-normalised.
            y: (B, M, D) those of the other; N = M for ``mse``.
            x_frames: (B,) int, in 1..N.
            y_frames: (B,) int, in 1..M.

        Returns:
            (B,) and (B,).
        """
        if isinstance(self.alignment, SSLMSE):
            alignment = self.alignment(x, y, x_frames)
        else:
            alignment = self.alignment(x, y, x_frames, y_frames)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha > 0):
            regulariser = self.regulariser(x, x_frames) + self.regulariser(y, y_frames)
        return alignment, regulariser

    def features(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the aligned layer's features ``(B, F, D)``, zero past the frames ``(B,)``."""
        return self.upstream(waves, lengths, layer=self.layer)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the tuned SSL model, without the projection; see ``posinv.ssl.load``."""
        self.upstream.save_pretrained(directory)

    def _check_lengths(self, lengths: Tensor, utt_id: Sequence[str]) -> None:
        shortest = self.upstream.min_samples
        for name, length in zip([*utt_id, *utt_id], lengths.tolist(), strict=True):
            if length < shortest:
                raise InputError(
                    f"utterance {name}: a view of {length} samples is less than the {shortest} "
                    "of one SSL frame; leave the utterance out"
                )


def _swapped(first: _Views, second: _Views, utt_id: Sequence[str]) -> tuple[_Views, _Views]:
    """Let the two views of a pair change places with probability one half."""
    swap = [random_state(name, "swap").random() < 0.5 for name in utt_id]
    pairs = [(b, a) if s else (a, b) for a, b, s in zip(first[0], second[0], swap, strict=True)]
    swap_lengths = torch.tensor(swap, device=first[1].device)
    return (
        ([a for a, _ in pairs], torch.where(swap_lengths, second[1], first[1])),
        ([b for _, b in pairs], torch.where(swap_lengths, first[1], second[1])),
    )
