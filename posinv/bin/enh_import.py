"""Make an enhancement training directory from a model's weights, ready for fine-tuning.

The weights are the state dict of a released DEMUCS, or the checkpoint of an ESPnet enhancement
training. The directory gets the files that enh_train writes: config.yaml and valid.loss.best.pth.
"""

import argparse
from pathlib import Path

import yaml

from posinv.bin.cli import command_parser, run
from posinv.data.checkpoint import load_weights, read_checkpoint, write_checkpoint
from posinv.data.files import write_atomic
from posinv.espnet.separator import DemucsSeparator
from posinv.espnet.tasks.enh import EnhancementTask, read_model
from posinv.models.demucs import read_release


def build(config: Path, checkpoint: Path, output_dir: Path) -> tuple[argparse.Namespace, dict]:
    """Build the model of ``config`` with the weights of ``checkpoint``.

    Returns:
        The options of ``enh_train`` that build the model, and the model's state dict.

    Raises:
        InputError: a file that cannot be read, or weights of another model.
    """
    train_args = EnhancementTask.get_parser().parse_args(["--output_dir", str(output_dir)])
    vars(train_args).update(read_model(config))
    model = EnhancementTask.build_model(train_args)
    released = read_release(checkpoint) if isinstance(model.separator, DemucsSeparator) else {}
    if "encoder.0.0.weight" in released:
        model.separator.load_release(released, checkpoint)
    else:
        state = released or read_checkpoint(checkpoint)
        load_weights(model, state, checkpoint, f"the model in {config}")
    return train_args, model.state_dict()


def main() -> None:
    """Build the model of ``--config`` with the weights of ``--checkpoint`` and save it."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="YAML file with the model's encoder, separator and decoder",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model's weights")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    train_args, state = build(args.config, args.checkpoint, args.output_dir)
    write_atomic(args.output_dir / "config.yaml", yaml.safe_dump(vars(train_args), sort_keys=False))
    write_checkpoint(state, args.output_dir / "valid.loss.best.pth")


if __name__ == "__main__":
    run(main)
