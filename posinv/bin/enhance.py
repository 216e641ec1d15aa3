"""Enhance audio files of any length, rate and number of channels with a trained model.

An input is an audio file, a folder or a Kaldi list (*.scp). The audio files of a folder, at any
depth, are written under the same relative paths; the utterances of a list as <utterance id>.wav,
with a wav.scp. A file's sampling rate and channels stay as they are; so do its format and subtype,
unless --format is given. What can't be enhanced is named at the end, with exit status 1.

--stream enhances standard input to standard output as it arrives, raw PCM of 16 bits (signed,
little-endian), 16 kHz, one channel, with a causal DEMUCS. The latency and, at the end, the
real-time factor go to standard error.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE
from posinv.data.device import pick_device
from posinv.data.parallel import map_parallel
from posinv.data.tables import write_table
from posinv.errors import InputError
from posinv.inference.enhancer import EnhanceJob, Enhancer, Existing, plan_enhancement
from posinv.inference.stream import pipe

# What a stream takes besides --stream; the other options are for files.
STREAM_OPTIONS = ("model", "checkpoint", "ngpu", "dry", "level")


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="*", type=Path, help="audio file, folder, or .scp list")
    add("--model", type=Path, required=True, help="training directory of enh_train")
    add("--checkpoint", default="valid.loss.best.pth", help="file in --model")
    add("--out", type=Path, help="folder to write")
    add("--format", choices=("wav", "flac"), help="write this format instead of each file's own")
    add("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU")
    add("--nj", type=int, default=1, help="processes on a CPU, of one thread each if several")
    add("--segment", type=float, default=10.0, help="seconds of audio that the model gets at once")
    add(
        "--overlap",
        type=float,
        default=1.0,
        help="seconds of overlap of two segments, which are cross-faded",
    )
    add("--dry", type=float, default=0.0, help="share of the input in the output, 0 to 1")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    group.add_argument("--skip_existing", action="store_true", help="keep existing outputs")
    add(
        "--allow_pipes",
        action="store_true",
        help="run the commands in lists; without it, they are named and refused",
    )
    add("--stream", action="store_true", help="enhance raw PCM from standard input to output")
    add(
        "--level",
        type=float,
        help="with --stream: the standard deviation of the samples, for full scale 1; by default "
        "the root mean square of the last 10 s",
    )
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
    if args.stream:
        for name, value in vars(args).items():
            if name not in ("stream", *STREAM_OPTIONS) and value not in (
                parser.get_default(name),
                [],
            ):
                given = "INPUT" if name == "inputs" else f"--{name}"
                raise InputError(f"--stream: {given} is for files: leave one of them out")
        _stream(args)
    else:
        _enhance_files(args)


def _stream(args: argparse.Namespace) -> None:
    if sys.stdin.isatty():
        raise InputError("--stream: standard input is a terminal: pipe raw 16-bit PCM into it")
    # What libraries print must not get among the samples.
    sink = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    enhancer = Enhancer(args.model, args.checkpoint, pick_device(args.ngpu), dry=args.dry)
    stream = enhancer.stream(args.level)
    logging.info("latency of %.1f ms", 1000 * stream.latency / SAMPLING_RATE)
    with sink, os.fdopen(os.dup(0), "rb", buffering=0) as source:
        done = pipe(stream, source, sink)
    seconds = done.samples / SAMPLING_RATE
    print(
        f"{seconds:.2f} s of audio, real-time factor {done.real_time_factor:.3f}", file=sys.stderr
    )


def _enhance_files(args: argparse.Namespace) -> None:
    if not args.inputs or args.out is None:
        raise InputError("give INPUT and --out, or --stream")
    if args.level is not None:
        raise InputError("--level is for --stream: leave it out")
    if args.nj > 1 and args.ngpu:
        raise InputError(f"--nj {args.nj} --ngpu 1: one process uses a GPU: leave one of them out")
    existing: Existing = "keep" if args.skip_existing else "replace" if args.overwrite else "refuse"
    jobs, wrong = plan_enhancement(args.inputs, args.out, args.format, existing, args.allow_pipes)
    kept = [job for job in jobs if job.exists]
    todo = [job for job in jobs if not job.exists]
    if args.nj > 1:
        torch.set_num_threads(1)  # also since torch's threads do not survive the fork
    enhancer = Enhancer(
        args.model, args.checkpoint, pick_device(args.ngpu), args.segment, args.overlap, args.dry
    )
    seconds = 0.0
    done = list(kept)
    total = sum(job.seconds for job in todo)
    started = time.perf_counter()
    with (
        logging_redirect_tqdm(),
        tqdm(total=total or None, desc="enhance", unit="s", unit_scale=True) as bar,
    ):

        def enhance(job: EnhanceJob) -> float | InputError:
            progress = bar.update if args.nj == 1 else None
            try:
                return enhancer.enhance_file(job.source, job.destination, progress)
            except InputError as error:
                return error

        for job, result in zip(todo, map_parallel(enhance, todo, args.nj), strict=True):
            if isinstance(result, InputError):
                wrong[job.source] = str(result)
                continue
            done.append(job)
            seconds += result
            if args.nj > 1:
                bar.update(result)
    elapsed = time.perf_counter() - started
    index = {job.utterance: job.destination for job in done if job.utterance}
    if index:
        write_table(args.out / "wav.scp", index)
    existed = f" ({len(kept)} of them existed)" if kept else ""
    speed = f", real-time factor {elapsed / seconds:.3f}" if seconds else ""
    print(f"{args.out}: {len(done)} files{existed}, {seconds / 60:.1f} minutes of audio{speed}")
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(wrong) + len(done)} files were not enhanced: "
            f"{'; '.join(wrong.values())}"
        )


if __name__ == "__main__":
    run(main)
