"""Make an enhancement training directory of a released checkpoint, ready to be fine-tuned.

The separator's ``checkpoint`` option names the file; what is written is what ``enh_train`` leaves:
``config.yaml`` and ``valid.loss.best.pth``.
"""

import argparse
from pathlib import Path

import torch
import yaml

from posinv.bin.cli import run
from posinv.tasks.enh import EnhancementTask


def main() -> None:
    """Build the model of ``--config`` from ``--checkpoint`` and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="enh_train's YAML; names the separator")
    parser.add_argument("--checkpoint", required=True, help="state dict, as released")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    train_args = EnhancementTask.get_parser().parse_args(
        ["--config", args.config, "--output_dir", str(args.output_dir)]
    )
    train_args.separator_conf["checkpoint"] = args.checkpoint
    model = EnhancementTask.build_model(train_args)
    # The weights are in the model file from here on.
    train_args.separator_conf["checkpoint"] = None
    args.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output_dir / "valid.loss.best.pth"
    torch.save(model.state_dict(), checkpoint.with_suffix(".partial"))
    with (args.output_dir / "config.yaml").open("w", encoding="utf-8") as file:
        yaml.safe_dump(vars(train_args), file, sort_keys=False)
    checkpoint.with_suffix(".partial").replace(checkpoint)


if __name__ == "__main__":
    run(main)
