"""Write a pretrained model as a Hugging Face folder, which SSL options take by its path."""

import argparse
from pathlib import Path

import torch
import yaml

from posinv.bin.cli import run
from posinv.errors import InputError
from posinv.tasks.pretrain import PretrainTask


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--exp", type=Path, required=True, help="pretrain_train's --output_dir")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument("--checkpoint", default="valid.loss.best.pth", help="file in --exp")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    for path in (args.exp / "config.yaml", args.exp / args.checkpoint):
        if not path.is_file():
            raise InputError(f"{path}: no such file; pretrain first, or correct the option")
    with (args.exp / "config.yaml").open(encoding="utf-8") as file:
        train_args = argparse.Namespace(**yaml.safe_load(file))
    model = PretrainTask.build_model(train_args)
    state = torch.load(args.exp / args.checkpoint, map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    run(main)
