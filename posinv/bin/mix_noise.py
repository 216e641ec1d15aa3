"""Write a noisy copy of a clean data directory, with a manifest of what was drawn."""

from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.corpora.noisy import NOISE_TYPES, SEEN, Mixing, mix_noise
from posinv.errors import InputError


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--src", type=Path, required=True, help="clean data directory")
    add("--out", type=Path, required=True, help="noisy data directory to write")
    add("--noise_types", default=" ".join(SEEN), help=f"of: {' '.join(NOISE_TYPES)}")
    add("--snrs", default="5 10 15 20", help="in dB; one is drawn for each utterance")
    add("--seed", type=int, default=0, help="of every draw")
    add("--tag", default="seen", help="ends the noisy utterances' ids")
    add("--silence", type=float, nargs=2, metavar=("LOW", "HIGH"), help="seconds put in front")
    add("--speeds", default="1", help="one is drawn for each utterance; pitch moves along")
    add("--babble_src", type=Path, help="data directory that babble is made of")
    add("--recorded", type=Path, nargs="+", default=(), help="noise recordings or directories")
    add("--copies", type=int, default=1, help="noisy copies of each utterance")
    add("--sampling_rate", type=int, default=16000, help="of all audio, in Hz")
    add("--resample", action="store_true", help="resample speech and recordings of other rates")
    add(
        "--on_bad_utt",
        choices=("stop", "skip"),
        default="stop",
        help="bad clean speech is an error, or is left out and listed in OUT/skipped",
    )
    add("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    mixing = Mixing(
        noise_types=args.noise_types.split(),
        snrs=_numbers("--snrs", args.snrs),
        seed=args.seed,
        tag=args.tag,
        silence=args.silence and tuple(args.silence),
        speeds=_numbers("--speeds", args.speeds),
        babble=args.babble_src,
        recorded=args.recorded,
        sampling_rate=args.sampling_rate,
        resample=args.resample,
    )
    count = mix_noise(args.src, args.out, mixing, args.copies, args.nj, args.on_bad_utt)
    print(f"{args.out}: {count} utterances")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        raise InputError(f"{option} '{text}': numbers separated by spaces") from None


if __name__ == "__main__":
    run(main)
