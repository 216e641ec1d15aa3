"""Make the units that pretraining predicts: k-means clusters of MFCCs, one a 20 ms frame."""

from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.parallel import map_parallel
from posinv.data.tables import read_table, write_table
from posinv.data.units import (
    HOP,
    WINDOW,
    assign_units,
    learn_units,
    load_units_model,
    mfcc_features,
    save_units_model,
)
from posinv.errors import InputError


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("--wav_scp", type=Path, required=True, help="the audio, at 16 kHz")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write units and kmeans.npz into"
    )
    parser.add_argument(
        "--kmeans", type=Path, help="kmeans.npz of an earlier run to apply instead of learning one"
    )
    parser.add_argument("--num_units", type=int, default=50, help="number of clusters to learn")
    parser.add_argument(
        "--learn_hours",
        type=float,
        default=10.0,
        help="hours of audio to learn from, whole utterances drawn at random; all if there is less",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of k-means")
    parser.add_argument("--nj", type=int, default=2, help="number of processes")
    args = parser.parse_args()
    entries = read_table(args.wav_scp)

    def features(utt: str) -> np.ndarray:
        wave = read_audio(entries[utt], SAMPLING_RATE)
        if len(wave) < WINDOW:
            raise InputError(
                f"{args.wav_scp}: utterance {utt} has {len(wave)} samples, less than the {WINDOW} "
                "of one frame; leave it out"
            )
        return mfcc_features(wave)

    # One thread a process: with more, BLAS on matrices this small spends its time waiting.
    with threadpool_limits(1):
        if args.kmeans:
            centres = load_units_model(args.kmeans)
        else:
            drawn = np.random.default_rng(args.seed).permutation(list(entries)).tolist()
            frames_wanted = args.learn_hours * 3600 * SAMPLING_RATE / HOP
            learn_from, frames = [], 0
            for one in map_parallel(features, drawn, args.nj):
                learn_from.append(one)
                frames += len(one)
                if frames >= frames_wanted:
                    break
            centres = learn_units(learn_from, args.num_units, args.seed)

        def units(utt: str) -> str:
            return " ".join(map(str, assign_units(features(utt), centres)))

        table = dict(zip(entries, map_parallel(units, entries, args.nj), strict=True))

    args.out.mkdir(parents=True, exist_ok=True)
    if not args.kmeans:
        save_units_model(args.out / "kmeans.npz", centres)
    write_table(args.out / "units", table)


if __name__ == "__main__":
    run(main)
