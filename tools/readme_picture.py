"""Draw README's pictures from a run, and copy its table of phoneme error rates into README.

The pictures are the alignment of noisy speech with faster clean speech, and the convergence of
fine-tuning:

    egs/mini/enh1/run.sh --results RESULTS.md
    python tools/readme_picture.py
"""

import re
from fractions import Fraction
from pathlib import Path

import torch

from posinv.augment.speed import resample
from posinv.bin.cli import command_parser, run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.report.convergence import LOGARITHMIC, fine_tuning_panels
from posinv.report.curves import save_figure
from posinv.report.experiment import Experiment
from posinv.report.pictures import align_features, alignment_figure, convergence_figure
from posinv.report.results import ERROR_RATES, write_results
from posinv.ssl.upstream import SSLUpstream

ROOT = Path(__file__).resolve().parents[1]
SPEED = Fraction(11, 10)
MARKS = (
    "A mark means that the 95 % interval of the difference excludes 0: \N{DOUBLE DAGGER} from "
    "the noisy input, * from before fine-tuning, \N{DAGGER} from `ssl_mse`."
)
CONVERGENCE = (
    "![The validation loss of each criterion falls while the enhancement model is fine-tuned]"
    "(tools/results/convergence.png)\n\n"
    "*The loss of each criterion on the validation set while it fine-tunes the enhancement model. "
    "The losses have different units, so each is shown relative to its own value after the first "
    "epoch.*"
)


def error_rates(results: Path) -> str:
    """Return the table of phoneme error rates in a RESULTS.md, with its caption.

    Raises:
        InputError: there is none.
    """
    pattern = rf"^{re.escape(ERROR_RATES['pr'])}, .+\n\n(\|.+\n)+"
    table = re.search(pattern, results.read_text(encoding="utf-8"), re.MULTILINE)
    if table is None:
        raise InputError(f"{results}: no table of phoneme error rates: run the recipe to its end")
    return table[0].rstrip()


def write_readme(results: Path, readme: Path) -> None:
    """Write the table of a RESULTS.md, and the picture of convergence, into a README."""
    write_results(readme, "posinv", f"{error_rates(results)}\n\n{MARKS}\n\n{CONVERGENCE}")


def main() -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, default=ROOT / "egs/mini/enh1", help="folder of a recipe that ran")
    add("--test_set", default="test_seen", help="its formatted test set")
    add("--utterance", help="id in it; if not given, the first")
    add("--ssl", help="SSL model; if not given, the one that the recipe pretrained")
    add("--out", type=Path, default=ROOT / "tools/results", help="folder of the images")
    args = parser.parse_args()
    panels = fine_tuning_panels(Experiment.read(args.recipe / "exp"))
    if not panels:
        raise InputError(f"{args.recipe}/exp: no fine-tuning: run the recipe to its end")
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
    over_updates = {title: {"updates": of["updates"]} for title, of in panels.items()}
    save_figure(convergence_figure(over_updates, LOGARITHMIC), args.out / "convergence.png")
    write_readme(args.recipe / "RESULTS.md", ROOT / "README.md")


if __name__ == "__main__":
    run(main)
