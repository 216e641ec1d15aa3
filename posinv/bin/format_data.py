"""Decode a data directory's audio into one file an utterance (data/X to dump/raw/X)."""

from pathlib import Path

from posinv.bin.align_option import add_align
from posinv.bin.cli import command_parser, run
from posinv.data.directory import format_data, read_skipped


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--src", type=Path, required=True, help="data directory to read")
    parser.add_argument("--out", type=Path, required=True, help="data directory to write")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="of all audio, in Hz")
    parser.add_argument("--resample", action="store_true", help="resample other rates")
    parser.add_argument(
        "--clean", action="store_true", help="write the clean references (spk1.scp) alone"
    )
    parser.add_argument("--audio_format", choices=("flac", "wav"), default="flac", help="written")
    parser.add_argument(
        "--min_samples", type=int, help="shortest utterance (one frame of 25 ms unless given)"
    )
    parser.add_argument(
        "--on_bad_utt",
        choices=("stop", "skip"),
        default="stop",
        help="a bad utterance is an error, or is left out and listed in OUT/skipped",
    )
    add_align(parser)
    parser.add_argument("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    samples, scaled = format_data(**{**vars(args), "align": dict(args.align)})
    note = f"; {scaled} utterances scaled to a peak of 1 after resampling" if scaled else ""
    print(f"{args.out}: {samples / args.sampling_rate / 60:.1f} minutes{note}")
    if skipped := read_skipped(args.out):
        print(f"{args.out}: {len(skipped)} utterances left out: {args.out / 'skipped'} says why")


if __name__ == "__main__":
    run(main)
