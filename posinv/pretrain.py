"""Masked prediction of k-means units, as in HuBERT's first iteration, for a small SSL model.

Hsu et al., *HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden
Units*, IEEE/ACM TASLP 2021, arXiv 2106.07447. Units are k-means clusters of MFCCs, one for each
frame of the SSL model.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from posinv.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.lengths import valid_mask
from posinv.perturb import random_state
from posinv.upstream import extract, frame_lengths, save_pretrained

WINDOW = 400  # samples: HuBERT's receptive field, 25 ms
HOP = 320  # samples: HuBERT's frames, 20 ms


def mfcc_features(wave: np.ndarray) -> np.ndarray:
    """Return 13 MFCCs with deltas and delta-deltas, aligned with the frames of an SSL model.

    Frame ``i`` is computed from samples ``320 i`` to ``320 i + 400``, what HuBERT's frame ``i``
    sees. Deltas are regressions over 5 windows 10 ms apart. Liftering as in Kaldi's MFCCs. The
    utterance's mean is subtracted, unlike HuBERT's: its units tell less of the speaker then.

    Args:
        wave: ``(T,)`` float32 at 16 kHz, T >= 400.

    Returns:
        ``(F, 39)`` float32, F the frames HuBERT has for T samples.
    """
    mfcc = librosa.feature.mfcc(
        y=librosa.effects.preemphasis(wave),
        sr=SAMPLING_RATE,
        n_mfcc=13,
        lifter=22,
        n_mels=23,
        fmin=20,
        n_fft=WINDOW,
        hop_length=HOP // 2,
        center=False,
    )
    deltas = [librosa.feature.delta(mfcc, width=5, order=n, mode="nearest") for n in (1, 2)]
    features = np.concatenate([mfcc, *deltas])[:, ::2].T
    return features - features.mean(0)


def learn_units(features: Iterable[np.ndarray], num_units: int, seed: int) -> np.ndarray:
    """Cluster frames by mini-batch k-means.

    Args:
        features: Utterances' features, each ``(F, D)``.
        num_units: The number of clusters, K.
        seed: Of the initialisation and the mini-batches.

    Returns:
        The centres, ``(K, D)`` float32.

    Raises:
        InputError: There are fewer frames than units.
    """
    frames = np.concatenate(list(features))
    if len(frames) < num_units:
        raise InputError(
            f"num_units {num_units}: more than the {len(frames)} frames to learn them from; "
            "take fewer units or more audio"
        )
    kmeans = MiniBatchKMeans(
        num_units,
        random_state=seed,
        n_init=5,
        batch_size=10000,
        max_no_improvement=20,
        reassignment_ratio=0.0,  # as in HuBERT's script
    )
    return kmeans.fit(frames).cluster_centers_.astype(np.float32)


def assign_units(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return each frame's nearest centre: ``(F, D)`` and ``(K, D)`` give ``(F,)`` int."""
    return pairwise_distances_argmin(features, centres)


def save_units_model(path: Path, centres: np.ndarray) -> None:
    """Write the centres as ``.npz``; the file appears whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    np.savez(temporary, centres=centres)
    temporary.replace(path)


def load_units_model(path: Path) -> np.ndarray:
    """Read the centres that :func:`save_units_model` wrote.

    Raises:
        InputError: There is no such file, or it is another kind of file.
    """
    try:
        with np.load(path) as content:
            return content["centres"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such k-means file; learn one without --kmeans") from error
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a k-means file of pretrain_units ({error})") from error


def draw_time_mask(
    lengths: Tensor, keys: Sequence[str], mask_prob: float, mask_length: int
) -> Tensor:
    """Draw the spans of frames to mask, each utterance by itself (``posinv.perturb``).

    An utterance of ``n`` frames gets ``mask_prob * n / mask_length`` spans, rounded up or down at
    random, at least one, whose starts are drawn without replacement; they may overlap, so
    ``mask_prob`` 0.8 masks about half the frames (wav2vec 2.0 and HuBERT). Spans are at most half
    the utterance long.

    Args:
        lengths: (B,) int, frames, at least 1.
        keys: The utterances' names, which key the draws.
        mask_prob: Spans times their length over the utterance's length.
        mask_length: Frames of a span.

    Returns:
        (B, F) bool on the device of ``lengths``, F the longest length.
    """
    mask = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.bool)
    for row, n, key in zip(mask, lengths.tolist(), keys, strict=True):
        state = random_state(key, "mask")
        span = min(mask_length, max(1, n // 2))
        count = max(1, int(mask_prob * n / mask_length + state.random()))
        starts = range(n - span + 1)
        for start in state.sample(starts, min(count, len(starts))):
            row[start : start + span] = True
    return mask.to(lengths.device)


class MaskedPredictionModel(AbsESPnetModel):
    """A HuBERT trained to tell the units of masked frames from the frames around them.

    Logits are the cosine similarities of the projected frame with each unit's embedding, over a
    temperature; the loss is their cross-entropy (the paper's equations 1 to 3), summed over the
    frames and divided by the number of masked ones. The feature
    penalty and the layer drop of fairseq's HuBERT are left out.

    Args:
        ssl_conf: What of ``transformers.HubertConfig`` differs from HuBERT-Base.
        num_units: The number of units.
        normalize: Bring each utterance to zero mean and unit variance.
        mask_prob: See :func:`draw_time_mask`.
        mask_length: Frames of a masked span.
        unmasked_weight: Weight of an unmasked frame's cross-entropy beside a masked one's 1.
        temperature: Divides the cosine similarities.

    Raises:
        InputError: An unknown or unusable option in ``ssl_conf``.
    """

    def __init__(
        self,
        ssl_conf: Mapping[str, object],
        num_units: int,
        normalize: bool = True,
        mask_prob: float = 0.8,
        mask_length: int = 10,
        unmasked_weight: float = 0.0,
        temperature: float = 0.1,
    ):
        super().__init__()
        self.ssl = HubertModel(_hubert_config(ssl_conf))
        self.projection = nn.Linear(self.ssl.config.hidden_size, self.ssl.config.hidden_size)
        self.unit_embeddings = nn.Parameter(torch.randn(num_units, self.ssl.config.hidden_size))
        self.normalize = normalize
        self.mask_prob = mask_prob
        self.mask_length = mask_length
        self.unmasked_weight = unmasked_weight
        self.temperature = temperature

    def forward(
        self,
        speech: Tensor,
        speech_lengths: Tensor | Sequence[int],
        units: Tensor,
        units_lengths: Tensor,
        utt_id: list[str],
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return ESPnet's loss, statistics and weight, the number of masked frames.

        Args:
            speech: (B, T) float at 16 kHz.
            speech_lengths: (B,) int, in samples.
            units: (B, F) int, in [0, num_units) within the lengths.
            units_lengths: (B,) int, in frames.
            utt_id: The utterances' names.

        Raises:
            InputError: An utterance's units are not as many as its frames or out of range.
        """
        speech_lengths = torch.as_tensor(speech_lengths)
        frames = frame_lengths(self.ssl.config, speech_lengths)
        self._check_units(frames, units, units_lengths, utt_id)
        units = units[:, : int(frames.max())]
        mask = draw_time_mask(frames, utt_id, self.mask_prob, self.mask_length).to(speech.device)
        output, _ = extract(self.ssl, speech, speech_lengths, self.normalize, mask)
        logits = self._logits(output.last_hidden_state[mask])
        loss = F.cross_entropy(logits, units[mask])
        stats = {"acc": (logits.detach().argmax(1) == units[mask]).float().mean()}
        if self.unmasked_weight:
            seen = ~mask & valid_mask(frames, mask.size(1), mask.device)
            seen_logits = self._logits(output.last_hidden_state[seen])
            # Over as many frames as the masked ones' mean: the batch's weight, so that parts of a
            # batch average to it.
            unmasked = F.cross_entropy(seen_logits, units[seen], reduction="sum")
            loss = loss + self.unmasked_weight * unmasked / mask.sum()
        stats["loss"] = loss.detach()
        return force_gatherable((loss, stats, mask.sum()), loss.device)

    def collect_feats(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return nothing: the input has no statistics to gather."""
        return {}

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the HuBERT, without the prediction head; see ``posinv.upstream``."""
        save_pretrained(self.ssl, directory, self.normalize)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, num_units)."""
        projected = F.normalize(self.projection(hidden), dim=-1)
        return projected @ F.normalize(self.unit_embeddings, dim=-1).T / self.temperature

    def _check_units(
        self, frames: Tensor, units: Tensor, units_lengths: Tensor, utt_id: list[str]
    ) -> None:
        for name, row, n, given in zip(
            utt_id, units, frames.tolist(), units_lengths.tolist(), strict=True
        ):
            if n != given:
                raise InputError(
                    f"utterance {name}: {given} units for {n} frames of its audio; make the "
                    "units from the same audio (pretrain_units)"
                )
            low, high = row[:n].aminmax()
            if low < 0 or high >= len(self.unit_embeddings):
                raise InputError(
                    f"utterance {name}: units {low} to {high} are not within 0 to "
                    f"{len(self.unit_embeddings) - 1}; set num_units to that of pretrain_units"
                )


def _hubert_config(ssl_conf: Mapping[str, object]) -> HubertConfig:
    known = HubertConfig().to_dict()
    for name in ssl_conf:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"ssl_conf: HuBERT's configuration has no {name!r}{hint}")
    try:
        config = HubertConfig(**ssl_conf)
    except Exception as error:  # transformers raises many kinds from its validators
        message = " ".join(str(error).split())
        raise InputError(f"ssl_conf: not a HuBERT configuration ({message})") from error
    if not (config.apply_spec_augment and config.mask_time_prob > 0):
        raise InputError(
            "ssl_conf: mask_time_prob must be positive and apply_spec_augment true, or HuBERT "
            "has no mask embedding to pretrain with"
        )
    return config
