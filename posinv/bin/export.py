"""Take a trained model anywhere: an SSL model as a transformers folder, a DEMUCS as a state dict.

``--exp`` is what pretrain_train, ssft_train or enh_train wrote; the folder that comes of it has a
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
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument("--checkpoint", default="valid.loss.best.pth", help="file in --exp")
    parser.add_argument(
        "--superb",
        type=Path,
        help="superb.sh's --dir: DIR/{pr,asr}/best/decode/scores.json go on the card",
    )
    parser.add_argument(
        "--base_license",
        help="licence of the model that training started from, such as apache-2.0; without it, "
        "what that model's own card says",
    )
    parser.add_argument("--name", help="title of the card; without it, the name of --out")
    args = parser.parse_args()
    export(**vars(args), command=shlex.join(["python", "-m", "posinv.bin.export", *sys.argv[1:]]))


if __name__ == "__main__":
    run(main)
