"""Trained enhancement models, loaded frozen for use in front of something else."""

import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from posinv.errors import InputError
from posinv.files import read_yaml

if TYPE_CHECKING:
    from espnet2.bin.enh_inference import SeparateSpeech


def load_enhancement_model(
    config: Path | str, checkpoint: Path | str, device: str = "cpu"
) -> "SeparateSpeech":
    """Load a trained ESPnet enhancement model for one speaker, in eval mode.

    posinv's separators must have been registered (``posinv.tasks.register``). The criteria that
    the model was trained with are left out: their SSL models needn't be there.

    Args:
        config: the model's ``config.yaml``, as ``enh_train`` leaves it.
        checkpoint: its weights (``*.pth``).
        device: where to run.

    Raises:
        InputError: a missing file, one that isn't what it should be, or a model that doesn't give
            exactly one speech signal.
    """
    config, checkpoint = Path(config), Path(checkpoint)
    train_args = read_yaml(config, "enhancement model")
    if not isinstance(train_args, dict) or "separator" not in train_args:
        raise InputError(f"{config}: not the config.yaml of an enhancement model (no separator)")
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint: was the training run? give its name")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device}: no GPU here: use the CPU (--ngpu 0)")
    # Here, since posinv.tasks.register, which must come before it, leads to this module.
    from espnet2.bin.enh_inference import SeparateSpeech

    train_args["criterions"] = []
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch) / "config.yaml"
        alone.write_text(yaml.safe_dump(train_args), encoding="utf-8")
        model = SeparateSpeech(alone, device=device)
    if model.num_spk != 1:
        raise InputError(f"{config}: separates {model.num_spk} speakers; a model for one is needed")
    # ESPnet would load it without weights_only, and take one that doesn't fit.
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.enh_model.load_state_dict(state)
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError),
        *(ValueError, KeyError, TypeError),
    ) as error:
        raise InputError(
            f"{checkpoint}: not weights of the model in {config} ({type(error).__name__}): give "
            "the checkpoint of that training"
        ) from error
    model.enh_model.requires_grad_(False)
    return model
