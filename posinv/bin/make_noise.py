"""Write a folder of synthetic noise recordings, one a type, listed in its wav.scp."""

from pathlib import Path

from posinv.augment.noise import NOISES
from posinv.bin.cli import command_parser, run
from posinv.corpora.noisy import SEEN, write_noise


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--noise_types", default=" ".join(SEEN), help=f"of: {' '.join(NOISES)} babble")
    add("--seconds", type=float, default=30.0, help="length of each recording")
    add("--seed", type=int, default=0, help="of every draw")
    add("--babble_src", type=Path, help="data directory that babble is made of")
    add("--sampling_rate", type=int, default=16000, help="of all audio, in Hz")
    add("--resample", action="store_true", help="resample speech of other rates")
    add(
        "--on_bad_utt",
        choices=("stop", "skip"),
        default="stop",
        help="bad speech for babble is an error, or is not drawn",
    )
    add("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    count = write_noise(
        args.out,
        args.noise_types.split(),
        args.seconds,
        args.seed,
        args.babble_src,
        args.nj,
        args.sampling_rate,
        args.resample,
        args.on_bad_utt,
    )
    print(f"{args.out}: {count} noise recordings")


if __name__ == "__main__":
    run(main)
