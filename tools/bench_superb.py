"""Compare training SUPERB's heads on one forward with training each by itself, in one run.

Phoneme (PR) and word (ASR) heads of conf/superb are trained on a frozen HuBERT-Base with random
weights: by heads_train, all at once, with and without its cache in files; and by asr_train, one by
one, of which one head of each kind is measured and counted as often as there are heads. The audio
is pink noise with the loudness changes of speech, in FLAC files; the targets are random. All are
ESPnet trainings of two epochs of --updates updates, each of two batches. The time is ESPnet's own
"train_time": the seconds from one update to the next, the mean of the second epoch. For heads at
once it is the last head's, which covers all: this head begins an epoch, and makes each update,
after the others. All trainings take turns, and the least of a training's times counts: a machine's
speed changes over minutes.

A front end that takes F, and heads that take p and a, need F + (heads' p and a) at once, and
F more for each head by itself. The row "possible" of the mix says how many times faster that is at
most; p and a are the times of one head with the cache, F is the rest of a separate phoneme head's.

From the times follow four totals for one model's evaluation on LibriSpeech with 5 learning rates of
PR and 3 of ASR, on this machine, scaled by the audio of an update: separate trainings; S3PRL's
practice, where 2 % (PR) and 5 % (ASR) of the updates choose the learning rate that is trained
again; heads_train with --sweep_updates 10000, without and with --cache_dir.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_ssft import write_flac
from benchmark import benchmark_parser, check_device, write_benchmark
from matplotlib.figure import Figure
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel

from posinv.bin.cli import run
from posinv.data.audio import SAMPLING_RATE
from posinv.espnet.heads import HeadsTask, parse_arguments
from posinv.espnet.tasks.asr import ASRTask
from posinv.report.curves import read_epochs, save_figure
from posinv.report.results import ABSENT

SUPERB = Path(__file__).parents[1] / "conf" / "superb"
TASKS = ("pr", "asr")
TOKENS = {"pr": (40, 10), "asr": (29, 15)}  # in the list, in a second of speech
MIX = (5, 3)  # SUPERB's learning rates: 1e-1 to 1e-5 for PR, 1e-3 to 1e-5 for ASR
UPDATES = {"pr": 100_000, "asr": 200_000}
SWEPT = {"pr": 0.02, "asr": 0.05}  # of the updates, in S3PRL's practice
SWEEP_UPDATES = 10_000
UTTERANCES, SECONDS, CORPUS = 32, 12.7, 28_539  # of an update; their length; of train-clean-100
BATCHES = 2  # of an update, in conf/superb
COLUMNS = ("phoneme_heads", "word_heads", "cache", "update_s", "separate_s", "times", "possible")

Heads = tuple[int, int]  # phoneme and word heads


class Bench:
    """Short audio, an SSL model, and trainings on them.

    Args:
        folder: for all files.
        args: the benchmark's options.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.count = 0
        torch.manual_seed(0)
        config = HubertConfig(**(TINY_SSL if args.quick else {}))
        self.size = config.hidden_size
        HubertModel(config).save_pretrained(folder / "ssl")
        samples = int(args.seconds * SAMPLING_RATE)
        files = write_flac(folder, args.updates * BATCHES * args.batch, samples)
        rng = np.random.default_rng(0)
        lists = {"wav.scp": files, "shape": [samples] * len(files)}
        for task, (kinds, rate) in TOKENS.items():
            words = rng.integers(kinds, size=(len(files), max(1, int(rate * args.seconds))))
            lists[task] = [" ".join(f"t{word}" for word in row) for row in words]
            tokens = ["<blank>", "<unk>", *(f"t{i}" for i in range(kinds)), "<sos/eos>"]
            (folder / f"{task}.tokens").write_text("\n".join(tokens) + "\n")
        for name, values in lists.items():
            lines = [f"utt{i:04} {value}\n" for i, value in enumerate(values)]
            (folder / name).write_text("".join(lines))
            (folder / f"valid.{name}").write_text(lines[0])

    def together(self, heads: Heads, cache: bool = False) -> float:
        """Return the seconds of an update of heads trained at once."""
        words, folders = [], []
        for task, count in zip(TASKS, heads, strict=True):
            for _ in range(count):
                folders.append(self._new_folder())
                words += ["--head", str(folders[-1]), *self._options(task)]
        words += ["--all", *self._common()]
        if cache:
            words += ["--cache_dir", str(self.folder / "cache")]
        HeadsTask.main(args=parse_arguments(words))
        return self._seconds(folders[-1])

    def separate(self, task: str) -> float:
        """Train one head by asr_train; return how many seconds an update takes."""
        folder = self._new_folder()
        ASRTask.main(cmd=[*self._common(), *self._options(task), "--output_dir", str(folder)])
        return self._seconds(folder)

    def _new_folder(self) -> Path:
        self.count += 1
        return self.folder / f"exp{self.count}"

    def _seconds(self, training: Path) -> float:
        return read_epochs(training)[1]["train"]["train_time"]

    def _common(self) -> list[str]:
        words = ["--frontend", "ssl", "--frontend_conf", f"ssl={self.folder / 'ssl'}"]
        for phase, prefix in (("train", ""), ("valid", "valid.")):
            words += [
                f"--{phase}_data_path_and_name_and_type",
                f"{self.folder / f'{prefix}wav.scp'},speech,sound",
                *(f"--{phase}_shape_file", str(self.folder / f"{prefix}shape")),
            ]
        return [
            *words,
            *("--batch_size", str(self.args.batch), "--accum_grad", str(BATCHES)),
            *("--max_epoch", "2", "--num_iters_per_epoch", str(self.args.updates * BATCHES)),
            *("--log_level", "ERROR"),
            *("--ngpu", str(int(self.args.device == "cuda")), "--use_amp", str(self.args.bf16)),
            *("--num_workers", "4" if self.args.device == "cuda" else "0"),
        ]

    def _options(self, task: str) -> list[str]:
        words = ["--config", str(SUPERB / f"{task}.yaml"), "--token_type", "word"]
        words += ["--token_list", str(self.folder / f"{task}.tokens")]
        for phase, prefix in (("train", ""), ("valid", "valid.")):
            path = self.folder / f"{prefix}{task}"
            words += [f"--{phase}_data_path_and_name_and_type", f"{path},text,text"]
        if self.args.quick:
            sizes = {"pr": {"encoder": {"output_size": 8}}, "asr": {"encoder": {"hidden_size": 8}}}
            sizes["asr"]["preencoder"] = {"input_size": self.size, "output_size": 8}
            for part, conf in sizes[task].items():
                for name, value in conf.items():
                    words += [f"--{part}_conf", f"{name}={value}"]
        return words


@dataclass
class Times:
    """Seconds of an update: of one head by task; of heads at once, without and with the cache."""

    separate: dict[str, float]
    together: dict[Heads, float]
    cached: dict[Heads, float]

    def separately(self, heads: Heads) -> float:
        """Seconds of an update of each of these heads, trained one by one."""
        return sum(n * self.separate[task] for n, task in zip(heads, TASKS, strict=True))

    def possible(self, heads: Heads) -> float:
        """How many times faster than separate trainings heads at once can be."""
        own = {"pr": self.cached[1, 0], "asr": self.cached[0, 1]}
        front_end = max(0.0, self.separate["pr"] - own["pr"])
        least = front_end + sum(n * own[task] for n, task in zip(heads, TASKS, strict=True))
        return (least + (sum(heads) - 1) * front_end) / least

    def totals(self) -> dict[str, float]:
        """Seconds of an evaluation in updates of the benchmark's length, by the way of training."""
        pr, asr = UPDATES["pr"], UPDATES["asr"]
        one_epoch = min(CORPUS / UTTERANCES, SWEEP_UPDATES)

        def swept(times: dict[Heads, float]) -> float:
            """Each learning rate up to the sweep's end, then the best of each task."""
            both, one = times[1, 1], times[0, 1]
            return SWEEP_UPDATES * times[MIX] + (pr - SWEEP_UPDATES) * both + (asr - pr) * one

        return {
            "separate trainings": sum(
                n * UPDATES[task] * self.separate[task] for n, task in zip(MIX, TASKS, strict=True)
            ),
            "S3PRL's practice": sum(
                (n * SWEPT[task] + 1) * UPDATES[task] * self.separate[task]
                for n, task in zip(MIX, TASKS, strict=True)
            ),
            "heads_train": swept(self.together),
            "heads_train with the cache": swept(self.cached)
            + one_epoch * (self.together[MIX] - self.cached[MIX]),
        }


def measure(bench: Bench, counts: Sequence[int], turns: int) -> Times:
    """Measure all that the table and the totals need."""
    mixes: list[Heads] = [MIX, (1, 1), (0, 1)]
    least = Times(
        separate=dict.fromkeys(TASKS, math.inf),
        together=dict.fromkeys([*((n, 0) for n in counts), *mixes], math.inf),
        cached=dict.fromkeys([(1, 0), *mixes], math.inf),
    )
    for _ in range(turns):
        for task, seconds in least.separate.items():
            least.separate[task] = min(seconds, bench.separate(task))
        for heads, seconds in least.together.items():
            least.together[heads] = min(seconds, bench.together(heads))
        for heads, seconds in least.cached.items():
            least.cached[heads] = min(seconds, bench.together(heads, cache=True))
    return least


def records(times: Times) -> list[list[str]]:
    """Return the cells of COLUMNS."""
    rows = []
    for cache, measured in (("no", times.together), ("yes", times.cached)):
        for heads, seconds in measured.items():
            separate = times.separately(heads)
            possible = ABSENT if cache == "yes" else f"{times.possible(heads):.2f}"
            numbers = (f"{seconds:.3f}", f"{separate:.3f}", f"{separate / seconds:.2f}")
            rows.append([*map(str, heads), cache, *numbers, possible])
    return rows


def plot(times: Times, title: str, out: Path) -> None:
    """Plot the seconds of an update, at once and one by one."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = [f"{pr} PR, {asr} ASR" for pr, asr in times.together]
    place = np.arange(len(names))
    axes.barh(place - 0.2, [times.separately(heads) for heads in times.together], 0.4)
    axes.barh(place + 0.2, list(times.together.values()), 0.4)
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.legend(["one by one", "at once"])
    axes.set(xlabel="seconds of an update", title=title)
    save_figure(figure, out)


def main() -> None:
    """Measure, write the CSV and the plot, and print the table and the totals."""
    parser = benchmark_parser(__doc__, "tiny models, to test the script itself")
    add = parser.add_argument
    add("--heads", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of phoneme heads")
    add("--batch", type=int, default=16, help="utterances in a batch (default: 16)")
    add("--seconds", type=float, default=2.0, help="length of an utterance (default: 2)")
    add("--updates", type=int, default=2, help="updates measured in a training (default: 2)")
    add("--turns", type=int, default=3, help="trainings of each kind, in turn (default: 3)")
    add("--bf16", action="store_true", help="mixed precision, on a GPU")
    args = parser.parse_args()
    check_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Bench(Path(folder), args), args.heads, args.turns)
    scale = UTTERANCES * SECONDS / (BATCHES * args.batch * args.seconds) / 3600
    totals = times.totals()
    settings = (
        f"- {'tiny model' if args.quick else 'HuBERT-Base'}, {BATCHES} batches of {args.batch} "
        f"utterances of {args.seconds:g} s in an update, {args.updates} updates, least of "
        f"{args.turns} turns, {args.device}, {torch.get_num_threads()} threads"
        f"{', bfloat16' * args.bf16}\n"
        f"- one model's evaluation on LibriSpeech, {MIX[0]} PR and {MIX[1]} ASR heads, on this "
        "machine: "
        + "; ".join(f"{name} {seconds * scale:,.0f} h" for name, seconds in totals.items())
        + f"; S3PRL's practice is {totals["S3PRL's practice"] / totals['heads_train']:.2f} and "
        f"{totals["S3PRL's practice"] / totals['heads_train with the cache']:.2f} times "
        "heads_train's, without and with the cache\n"
    )
    name = f"superb_{args.device}"
    write_benchmark(args.out / f"{name}.csv", settings, COLUMNS, records(times))
    plot(times, f"Heads at once, {args.device}", args.out / f"{name}.png")


if __name__ == "__main__":
    run(main)
