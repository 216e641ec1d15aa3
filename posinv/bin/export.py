"""Export a trained model: an SSL model for transformers, a DEMUCS for denoiser.

--exp is a training directory of pretrain_train, ssft_train or enh_train. The exported folder has a
model card, README.md, which says how to load the model, also with S3PRL. --push uploads it to the
Hugging Face hub.
"""

import shlex
import sys
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.errors import InputError
from posinv.inference.export import export
from posinv.inference.hub import check_hub, push_folder


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
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="upload the folder into this new repository of the Hugging Face hub, a private one; "
        "needs hf auth login, or HF_TOKEN",
    )
    parser.add_argument("--public", action="store_true", help="with --push: for everyone to read")
    args = vars(parser.parse_args())
    push, public = args.pop("push"), args.pop("public")
    if public and push is None:
        raise InputError("--public is for --push: leave it out, or name a repository")
    if push is not None:
        check_hub(push)
    export(**args, command=shlex.join(["python", "-m", "posinv.bin.export", *sys.argv[1:]]))
    if push is not None:
        kind = "public" if public else "private"
        print(f"{push_folder(args['out'], push, public)}: {kind} repository, uploaded")


if __name__ == "__main__":
    run(main)
