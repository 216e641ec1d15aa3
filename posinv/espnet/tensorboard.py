"""What TensorBoard shows beside ESPnet's statistics: alignments, spectrograms, audio."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from espnet2.enh.espnet_model import ESPnetEnhancementModel
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from posinv.augment.speed import resample
from posinv.data.audio import SAMPLING_RATE
from posinv.espnet.criteria import SSLCriterion
from posinv.models.ssft import SSFTModel
from posinv.report.pictures import align_features, alignment_image, coloured, spectrogram, spectrum

MAX_SECONDS = 10  # of the utterance that is shown
SPEED = Fraction(11, 10)  # of the clean speech with which enhanced speech is aligned


def show_validation(
    model: torch.nn.Module,
    names: Sequence[str],
    batch: Mapping[str, Tensor | list[int]],
    writer: SummaryWriter,
    step: int,
) -> None:
    """Add pictures and audio of the first utterance of the validation set, up to 10 s of it.

    Enhancement: the noisy, the enhanced and the clean speech; with an SSL criterion, the alignment
    of the enhanced speech's features with those of the clean speech 1.1 times as fast. SSL
    fine-tuning: the utterance, its perturbed copy, and their alignment. Other models: nothing.

    Args:
        model: the model, in eval mode.
        names: the utterance ids of a batch of the validation set.
        batch: its data, as the task's collate function gives them.
        writer: TensorBoard's writer.
        step: updates until now.
    """
    model = getattr(model, "module", model)
    if isinstance(model, ESPnetEnhancementModel):
        _show_enhancement(model, batch, writer, step)
    elif isinstance(model, SSFTModel):
        _show_views(model, names, batch, writer, step)


def _first(batch: Mapping[str, Tensor | list[int]], name: str, model: torch.nn.Module) -> Tensor:
    """Return the first utterance (1, T) of a batch, on the model's device."""
    waves = torch.as_tensor(batch[name])
    length = int(batch[f"{name}_lengths"][0]) if f"{name}_lengths" in batch else waves.size(1)
    device = next(model.parameters()).device
    return waves[:1, : min(length, MAX_SECONDS * SAMPLING_RATE)].to(device)


def _show_enhancement(
    model: ESPnetEnhancementModel,
    batch: Mapping[str, Tensor | list[int]],
    writer: SummaryWriter,
    step: int,
) -> None:
    noisy = _first(batch, "speech_mix", model)
    clean = _first({**batch, "speech_ref1_lengths": [noisy.size(1)]}, "speech_ref1", model)
    normalized = model.normalize_variance or model.normalize_variance_per_ch
    scale = noisy.std(dim=1, keepdim=True) if normalized else 1.0
    lengths = torch.tensor([noisy.size(1)], device=noisy.device)
    estimates, *_ = model.forward_enhance(noisy / scale, lengths, {})
    enhanced = estimates[0] * scale
    level = float(spectrum(clean[0].cpu().numpy()).max())
    for name, wave in (("1 noisy", noisy), ("2 enhanced", enhanced), ("3 clean", clean)):
        _add_speech(writer, name, wave, step, level)
    for wrapper in model.loss_wrappers:
        criterion = wrapper.criterion
        if isinstance(criterion, SSLCriterion):
            fast = resample(clean, SPEED).to(clean.dtype)
            x, y = (_features(criterion, wave) for wave in (enhanced, fast))
            _add_alignment(writer, x, y, step)
            return


def _features(criterion: SSLCriterion, wave: Tensor) -> Tensor:
    hidden, _ = criterion.features(wave, torch.tensor([wave.size(1)], device=wave.device))
    return hidden[0]


def _show_views(
    model: SSFTModel,
    names: Sequence[str],
    batch: Mapping[str, Tensor | list[int]],
    writer: SummaryWriter,
    step: int,
) -> None:
    speech = _first(batch, "speech", model)
    lengths = torch.tensor([speech.size(1)])
    view, view_lengths = model.perturb(speech, lengths, names[:1])
    hidden, frames = model.view_features((list(speech), lengths), (list(view), view_lengths))
    for name, wave in (("1 utterance", speech), ("2 perturbed", view[:, : int(view_lengths[0])])):
        _add_speech(writer, name, wave, step)
    x, y = (
        model.projection(features[0, : int(length)])
        for features, length in zip(hidden, frames, strict=True)
    )
    _add_alignment(writer, x, y, step)


def _add_speech(
    writer: SummaryWriter, name: str, wave: Tensor, step: int, level: float | None = None
) -> None:
    samples = wave[0].float().cpu().numpy()
    image = coloured(spectrogram(samples, level))
    writer.add_image(f"spectrogram/{name}", image, step, dataformats="HWC")
    writer.add_audio(f"speech/{name}", np.clip(samples, -1, 1), step, SAMPLING_RATE)


def _add_alignment(writer: SummaryWriter, x: Tensor, y: Tensor, step: int) -> None:
    image = alignment_image(align_features(x, y, gamma=0.1))
    writer.add_image("alignment/distance, soft alignment", image, step, dataformats="HWC")
