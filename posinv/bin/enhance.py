"""Enhance audio files of any length, rate and number of channels with a trained model.

An input is an audio file, a folder (its audio files at any depth, under the same paths) or a
Kaldi list, *.scp (to <id>.wav each, and a wav.scp of them). Sampling rate and channels stay a
file's own, as do format and subtype unless --format is given.
"""

import logging
import time
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from posinv.bin.cli import command_parser, run
from posinv.data.tables import write_table
from posinv.inference.enhancer import Enhancer, plan_enhancement


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", type=Path, help="audio file, folder, or .scp list")
    add("--model", type=Path, required=True, help="training directory of enh_train")
    add("--checkpoint", default="valid.loss.best.pth", help="its name in the model's directory")
    add("--out", type=Path, required=True, help="folder to write")
    add("--format", choices=("wav", "flac"), help="write this instead of each file's own format")
    add("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU")
    add("--segment", type=float, default=10.0, help="seconds the model hears at a time")
    add("--overlap", type=float, default=1.0, help="seconds that segments share, cross-faded")
    add("--overwrite", action="store_true", help="replace existing outputs")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
    jobs = plan_enhancement(args.inputs, args.out, args.format, args.overwrite)
    device = "cuda" if args.ngpu else "cpu"
    enhancer = Enhancer(args.model, args.checkpoint, device, args.segment, args.overlap)
    seconds = 0.0
    total = sum(job.seconds for job in jobs)
    started = time.perf_counter()
    with (
        logging_redirect_tqdm(),
        tqdm(total=total or None, desc="enhance", unit="s", unit_scale=True) as bar,
    ):
        for job in jobs:
            seconds += enhancer.enhance_file(job.source, job.destination, bar.update)
    elapsed = time.perf_counter() - started
    index = {job.utterance: job.destination for job in jobs if job.utterance}
    if index:
        write_table(args.out / "wav.scp", index)
    print(
        f"{args.out}: {len(jobs)} files, {seconds / 60:.1f} minutes of audio, "
        f"real-time factor {elapsed / seconds:.3f}"
    )


if __name__ == "__main__":
    run(main)
