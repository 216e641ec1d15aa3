"""Export a trained model: an SSL model for transformers, a DEMUCS as a state dict for denoiser.

--exp is a training directory of pretrain_train, ssft_train or enh_train. The exported folder has a
model card, README.md, which says how to load the model.
"""

import shlex
import sys
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.inference.export import export


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--exp", type=Path, required=True, help="the training's --output_dir")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; must be new or empty"
    )
    parser.add_argument("--checkpoint", default="valid.loss.best.pth", help="file in --exp")
    parser.add_argument(
        "--superb",
        type=Path,
        help="folder whose {pr,asr}/best/decode/scores.json the card quotes: a system's superb/",
    )
    parser.add_argument(
        "--base_license",
        help="licence of the model that training started from, for example apache-2.0; by default "
        "it is taken from that model's own card",
    )
    parser.add_argument("--name", help="title of the card; by default the name of --out")
    args = parser.parse_args()
    export(**vars(args), command=shlex.join(["python", "-m", "posinv.bin.export", *sys.argv[1:]]))


if __name__ == "__main__":
    run(main)
