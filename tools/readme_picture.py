"""Draw README's pictures: the alignment of noisy speech with faster clean speech, and convergence.

Run it where egs/mini/enh1 has made its data and its SSL model (stages 1 to 4); convergence needs
its fine-tuning (stage 6), too:

    python tools/readme_picture.py --recipe egs/mini/enh1
"""

from fractions import Fraction
from pathlib import Path

import torch

from posinv.augment.speed import resample
from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.tables import read_table
from posinv.report.convergence import LOGARITHMIC, fine_tuning_panels
from posinv.report.curves import save_figure
from posinv.report.experiment import Experiment
from posinv.report.pictures import align_features, alignment_figure, convergence_figure
from posinv.ssl.upstream import SSLUpstream

SPEED = Fraction(11, 10)


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, default=Path("egs/mini/enh1"), help="folder of a recipe that ran")
    add("--test_set", default="test_seen", help="its formatted test set")
    add("--utterance", help="id in it; if not given, the first")
    add("--ssl", help="SSL model; if not given, the one that the recipe pretrained")
    add("--out", type=Path, default=Path("tools/results"), help="folder of the images")
    args = parser.parse_args()
    data = args.recipe / "dump" / "raw" / args.test_set
    noisy, clean = (read_table(data / name) for name in ("wav.scp", "spk1.scp"))
    utterance = args.utterance or min(noisy)
    waves = [
        torch.from_numpy(read_audio(str(args.recipe / table[utterance]), SAMPLING_RATE))[None]
        for table in (noisy, clean)
    ]
    upstream = SSLUpstream(args.ssl or str(args.recipe / "exp" / "ssl" / "model"))
    with torch.inference_mode():
        x, y = (
            upstream(wave, [wave.shape[1]], layer=-1)[0][0]
            for wave in (waves[0], resample(waves[1], SPEED).float())
        )
    columns = f"clean, {float(SPEED)} times as fast"
    seconds = upstream.hop / SAMPLING_RATE
    figure = alignment_figure(align_features(x, y, gamma=0.1), seconds, "noisy speech", columns)
    save_figure(figure, args.out / "alignment.png")
    if panels := fine_tuning_panels(Experiment.read(args.recipe / "exp")):
        save_figure(convergence_figure(panels, LOGARITHMIC), args.out / "convergence.png")


if __name__ == "__main__":
    run(main)
