"""Masked prediction of k-means units: pretraining of a small SSL model as HuBERT's first iteration.

Hsu et al., *HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden
Units*, IEEE/ACM TASLP 2021, arXiv 2106.07447. Units are k-means clusters of MFCCs, one for each
frame of the SSL model.
"""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from posinv.augment.draws import random_state
from posinv.errors import InputError
from posinv.lengths import valid_mask
from posinv.ssl.exact import extract, model_output
from posinv.ssl.load import frame_lengths, save_pretrained
from posinv.ssl.sinusoidal_hubert import SinusoidalHubertConfig, SinusoidalHubertModel

FAMILIES: dict[str, tuple[type[HubertConfig], type[HubertModel]]] = {
    "hubert": (HubertConfig, HubertModel),
    "sinusoidal-hubert": (SinusoidalHubertConfig, SinusoidalHubertModel),
}


def draw_time_mask(
    lengths: Tensor, keys: Sequence[str], mask_prob: float, mask_length: int
) -> Tensor:
    """Draw the spans of frames to mask, for each utterance by itself (``posinv.augment.draws``).

    An utterance of ``n`` frames gets ``mask_prob * n / mask_length`` spans, rounded up or down at
    random, but at least one. Their starts are drawn without replacement. Spans may overlap, so a
    ``mask_prob`` of 0.8 masks about half of the frames (wav2vec 2.0 and HuBERT). A span is at most
    half of the utterance.

    Args:
        lengths: (B,) int, frames, at least 1.
        keys: The utterance ids.
        mask_prob: Number of spans times their length, over the utterance's length.
        mask_length: Length of a span, in frames.

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


class MaskedPredictionModel(nn.Module):
    """A HuBERT trained to predict the units of masked frames from the frames around them.

    Logits are the cosine similarities of the projected frame with each unit's embedding, divided by
    a temperature. The loss is their cross-entropy (the paper's equations 1 to 3), summed over the
    frames and divided by the number of masked ones. It has neither the feature penalty nor the
    layer drop of fairseq's HuBERT.

    Args:
        ssl_conf: Options of ``transformers.HubertConfig`` that differ from HuBERT-Base's, and of
            :class:`~posinv.ssl.sinusoidal_hubert.SinusoidalHubertConfig`.
        num_units: The number of units.
        normalize: Bring each utterance to zero mean and unit variance.
        mask_prob: See :func:`draw_time_mask`.
        mask_length: Length of a span, in frames.
        unmasked_weight: Weight of an unmasked frame's cross-entropy; a masked frame's is 1.
        temperature: Divides the cosine similarities.

    Raises:
        InputError: An unknown or unusable option in ``ssl_conf``.
    """

    def __init__(
        self,
        ssl_conf: Mapping[str, Any],
        num_units: int,
        normalize: bool = True,
        mask_prob: float = 0.8,
        mask_length: int = 10,
        unmasked_weight: float = 0.0,
        temperature: float = 0.1,
    ):
        super().__init__()
        config = _hubert_config(ssl_conf)
        _, model_class = FAMILIES[config.model_type]
        self.ssl = model_class(config)
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
        """Return the loss, statistics, and the number of masked frames.

        Args:
            speech: (B, T) float at 16 kHz.
            speech_lengths: (B,) int, in samples.
            units: (B, F) int, in [0, num_units) within the lengths.
            units_lengths: (B,) int, in frames.
            utt_id: The utterance ids.

        Raises:
            InputError: An utterance's units are out of range, or not as many as its frames.
        """
        speech_lengths = torch.as_tensor(speech_lengths)
        frames = frame_lengths(self.ssl.config, speech_lengths)
        self._check_units(frames, units, units_lengths, utt_id)
        units = units[:, : int(frames.max())]
        mask = draw_time_mask(frames, utt_id, self.mask_prob, self.mask_length).to(speech.device)
        hidden, _ = extract(self.ssl, speech, speech_lengths, self.normalize, mask, layer=-1)
        output = model_output(self.ssl, hidden)
        logits = self._logits(output[mask])
        loss = F.cross_entropy(logits, units[mask])
        stats = {"acc": (logits.detach().argmax(1) == units[mask]).float().mean()}
        if self.unmasked_weight:
            seen = ~mask & valid_mask(frames, mask.size(1), mask.device)
            seen_logits = self._logits(output[seen])
            # Divided by the number of masked frames, as the masked frames' loss is: that number is
            # the batch's weight, by which ESPnet averages the parts of a batch.
            unmasked = F.cross_entropy(seen_logits, units[seen], reduction="sum")
            loss = loss + self.unmasked_weight * unmasked / mask.sum()
        stats["loss"] = loss.detach()
        return loss, stats, mask.sum()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the HuBERT, without the prediction head; see ``posinv.ssl.load``."""
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


def _hubert_config(ssl_conf: Mapping[str, Any]) -> HubertConfig:
    options = dict(ssl_conf)
    family = options.pop("model_type", HubertConfig.model_type)
    if family not in FAMILIES:
        raise InputError(f"ssl_conf: model_type {family!r} must be one of: {', '.join(FAMILIES)}")
    config_class, _ = FAMILIES[family]
    known = config_class().to_dict()
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"ssl_conf: HuBERT's configuration has no {name!r}{hint}")
    try:
        config = config_class(**options)
    except Exception as error:  # transformers raises many kinds from its validators
        message = " ".join(str(error).split())
        raise InputError(f"ssl_conf: not a HuBERT configuration ({message})") from error
    if not (config.apply_spec_augment and config.mask_time_prob > 0):
        raise InputError(
            "ssl_conf: mask_time_prob must be positive and apply_spec_augment true, or HuBERT "
            "has no mask embedding to pretrain with"
        )
    return config
