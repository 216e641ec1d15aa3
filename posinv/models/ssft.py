r"""Self-supervised fine-tuning of an SSL model: an utterance is aligned with its perturbed copy.

LASER (Meghanani & Hain, *LASER: Learning by Aligning Self-supervised Representations of Speech
for Improving Content-related Tasks*, Interspeech 2024, arXiv 2406.09153). Soft-DTW alone,
frame-by-frame MSE and the noise-robust variant (NR-SSFT) are configurations of the same model.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posinv.augment.views import Perturbation
from posinv.errors import InputError
from posinv.losses import SSLMSE, ContrastiveIDM
from posinv.losses.functional import effective_rank, frame_distance
from posinv.softdtw import SoftDTWLoss
from posinv.ssl.load import check_layer, hop, load_config
from posinv.ssl.upstream import SSLUpstream

LOSSES = ("soft_dtw", "mse")


class SSFTModel(nn.Module):
    r"""An SSL model whose last layers learn to give two views of an utterance the same content.

    Each view's features of one layer are projected, :math:`z = \mathrm{L2norm}(W h)`. With x and
    y the two views' z, the loss of a pair is

    .. math:: D_\gamma(x, y) + \alpha (\mathrm{IDM}(x) + \mathrm{IDM}(y))

    where :math:`D_\gamma` is the soft-DTW divergence or, for views of equal length, the mean over
    frames of :math:`\|x_i - y_i\|^2`; see :class:`~posinv.softdtw.SoftDTWLoss` and
    :class:`~posinv.losses.ContrastiveIDM`. A batch's loss is the mean of its pairs' losses, each
    over true lengths. The first view is the utterance itself, the second its perturbed copy. (The
    authors swap them with probability one half, which has no effect, as the loss is symmetric.)

    Only the trained layers have dropout. The modules before them are in eval mode, and autograd
    records nothing of them.

    Args:
        ssl: the SSL model, a hub name or a folder (see :class:`~posinv.ssl.upstream.SSLUpstream`).
        layer: hidden state that is aligned, 1 to the last, or -1 for the last.
        trainable_layers: number of transformer layers that are trained: the layer that gives
            hidden state ``layer``, and those before it. The rest of the SSL model is frozen.
        projection_size: width of z.
        loss: ``soft_dtw`` or ``mse``.
        gamma: smoothing of soft-DTW.
        alpha: weight of the regulariser; 0 leaves it out.
        margin: margin of the regulariser, a Euclidean distance of unit vectors, 0 to 2.
        window: window of the regulariser, in frames.
        views: options of :class:`~posinv.augment.views.Perturbation`, which makes the second view.

    Raises:
        InputError: no such model or layer, or an argument out of range.
    """

    def __init__(
        self,
        ssl: str,
        layer: int = -1,
        trainable_layers: int = 2,
        projection_size: int = 256,
        loss: str = "soft_dtw",
        gamma: float = 0.1,
        alpha: float = 0.0,
        margin: float = 1.1,
        window: int = 0,
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
        try:
            self.perturb = Perturbation(**(views or {}), hop=hop(config))
        except TypeError as error:
            raise InputError(f"model_conf: views: {error}") from error
        if loss == "mse" and not self.perturb.keeps_length:
            raise InputError(
                "model_conf: the loss mse needs views of equal length; leave speed and pad out "
                "of views, or take soft_dtw"
            )
        first = self.layer - trainable_layers
        self.upstream = SSLUpstream(
            ssl, trainable=[f"encoder.layers.{i}.*" for i in range(first, self.layer)]
        )
        self.projection = nn.Linear(self.upstream.output_size, projection_size)
        self.alignment = SoftDTWLoss(gamma) if loss == "soft_dtw" else SSLMSE()
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
        lengths = torch.cat([speech_lengths, view_lengths])
        self._check_lengths(lengths, utt_id)
        waves = nn.utils.rnn.pad_sequence([*speech, *view], batch_first=True)
        hidden, frames = self.features(waves, lengths)
        z = F.normalize(self.projection(hidden).float(), dim=2)

        alignment, regulariser = self.pair_losses(*z.chunk(2), *frames.chunk(2))
        loss = (alignment + self.alpha * regulariser).mean()
        stats = {
            "loss": loss.detach(),
            "alignment": alignment.detach().mean(),
            "regulariser": regulariser.detach().mean(),
        }
        if not self.training:
            for prefix, features in (("", z), ("ssl_", hidden)):
                own = features[: len(speech)], frames[: len(speech)]
                stats[f"{prefix}frame_distance"] = frame_distance(*own).mean()
                stats[f"{prefix}effective_rank"] = effective_rank(*own).mean()
        return loss, stats, loss.new_full((), len(speech))

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
