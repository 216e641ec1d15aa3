"""Trained enhancement models, loaded with frozen parameters."""

import tempfile
from pathlib import Path

import torch
import yaml
from espnet2.bin.enh_inference import SeparateSpeech

from posinv.data.checkpoint import load_weights, read_checkpoint
from posinv.data.files import read_yaml
from posinv.errors import InputError


def load_enhancement_model(
    config: Path | str, checkpoint: Path | str, device: str = "cpu"
) -> SeparateSpeech:
    """Load a trained ESPnet enhancement model for one speaker, in eval mode.

    The criteria of the training are left out, so their SSL models needn't exist any more.

    Args:
        config: the model's ``config.yaml``, as ``enh_train`` writes it.
        checkpoint: its weights (``*.pth``).
        device: device of the model: ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        InputError: a file is missing, is no configuration of an enhancement model or holds other
            weights; the model separates several speakers; there is no GPU.
    """
    config, checkpoint = Path(config), Path(checkpoint)
    train_args = read_yaml(config, "enhancement model")
    if not isinstance(train_args, dict) or "separator" not in train_args:
        raise InputError(f"{config}: not the config.yaml of an enhancement model (no separator)")
    state = read_checkpoint(checkpoint)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device}: no GPU here: use the CPU (--ngpu 0)")
    train_args["criterions"] = []
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch) / "config.yaml"
        alone.write_text(yaml.safe_dump(train_args), encoding="utf-8")
        model = SeparateSpeech(alone, device=device)
    if model.num_spk != 1:
        raise InputError(f"{config}: separates {model.num_spk} speakers; a model for one is needed")
    # ESPnet's own loading accepts weights that don't fit.
    load_weights(model.enh_model, state, checkpoint, f"the model in {config}")
    model.enh_model.requires_grad_(False)
    return model
