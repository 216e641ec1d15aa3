"""Make an enhancement training directory of a model's weights, ready to be fine-tuned.

The weights are a released DEMUCS's (its state dict), or those that an ESPnet enhancement training
saved. What is written is what ``enh_train`` leaves: ``config.yaml`` and ``valid.loss.best.pth``.
"""

import argparse
from pathlib import Path

import torch
import yaml

from posinv.bin.cli import command_parser, run
from posinv.data.checkpoint import load_weights, read_checkpoint
from posinv.data.files import atomic_file, write_atomic
from posinv.espnet.separator import DemucsSeparator
from posinv.espnet.tasks.enh import EnhancementTask, read_model
from posinv.models.demucs import read_release


def build(config: Path, checkpoint: Path, output_dir: Path) -> tuple[argparse.Namespace, dict]:
    """Build the model of ``config`` with the weights of ``checkpoint``.

    Returns:
        The options that make it, and its state dict.

    Raises:
        InputError: a file that can't be read, or weights of another model.
    """
    train_args = EnhancementTask.get_parser().parse_args(["--output_dir", str(output_dir)])
    vars(train_args).update(read_model(config))
    model = EnhancementTask.build_model(train_args)
    demucs = isinstance(model.separator, DemucsSeparator)
    state = read_release(checkpoint) if demucs else read_checkpoint(checkpoint)
    if demucs and "encoder.0.0.weight" in state:
        model.separator.load_release(state, checkpoint)
    else:
        load_weights(model, state, checkpoint, f"the model in {config}")
    return train_args, model.state_dict()


def main() -> None:
    """Build the model of ``--config`` with the weights of ``--checkpoint`` and save it."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML that names the model")
    parser.add_argument("--checkpoint", type=Path, required=True, help="its weights")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    train_args, state = build(args.config, args.checkpoint, args.output_dir)
    write_atomic(args.output_dir / "config.yaml", yaml.safe_dump(vars(train_args), sort_keys=False))
    # torch writes the name of a path into the file, but not that of a stream
    with (
        atomic_file(args.output_dir / "valid.loss.best.pth") as temporary,
        temporary.open("wb") as file,
    ):
        torch.save(state, file)


if __name__ == "__main__":
    run(main)
