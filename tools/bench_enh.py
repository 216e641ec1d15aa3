"""Compare the speed of SE fine-tuning in posinv and in a straightforward way, in one run.

An update enhances noisy speech, computes the SSL features of the enhanced and of the clean speech,
a criterion and its gradient in the enhancement model, and does a step of Adam. "posinv" is the
criterion as enh_train runs it, on a batch at a time. "one by one" is our own code for the
straightforward way, with the same two models: one utterance at a time, with accumulated gradients,
and, for ssl_softdtw, librosa's resampling and a scalar loop over the cells of the alignments. The
enhancement model has the sizes of master64, the SSL model those of HuBERT-Base or WavLM-Base, and
both have random weights. Before the measurement, both losses of the same utterance are compared.

The phase "clean" is the SSL model's forward of the clean reference, for which no gradient is
computed; "loss" includes the reference's padding or change of speed. The implementations take
turns. On a GPU, CUDA events time the phases, and "update" is wall-clock time.
"""

import sys
import tempfile
import time
from collections.abc import Sequence

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from bench_softdtw import naive_divergence
from bench_ssft import CONFIGS, SSL_MODELS
from benchmark import (
    Clock,
    Row,
    benchmark_parser,
    check_device,
    plot_phases,
    speech_like,
    write_benchmark,
)
from tiny_ssl import TINY_SSL
from torch import Tensor
from transformers import AutoModel

from posinv.augment.draws import random_state
from posinv.bin.cli import run
from posinv.data.audio import SAMPLING_RATE
from posinv.errors import InputError
from posinv.espnet.criteria import CRITERIA, SSLCriterion
from posinv.models.demucs import Demucs

TOLERANCE = 1e-4
MEASURED = ("ssl_mse", "ssl_mse_pad", "ssl_softdtw")
PHASES = ("enhancement", "clean", "enhanced", "loss", "backward", "optimiser")
COLUMNS = (
    *("criterion", "implementation", "utterances", "updates", "update_ms", "min_ms", "max_ms"),
    "times_posinv",
    *(f"{phase}_ms" for phase in PHASES),
    "peak_MiB",
)
HOUR_OF_FRAMES = 50 * 3600


class Posinv:
    """An update's gradients as enh_train computes them."""

    name = "posinv"

    def __init__(self, enhancer: Demucs, criterion: SSLCriterion) -> None:
        self.enhancer, self.criterion = enhancer, criterion

    def loss(self, clean: Tensor, enhanced: Tensor, keys: Sequence[str]) -> Tensor:
        """Return the losses (B,) of enhanced speech (B, T)."""
        lengths = torch.full((len(clean),), clean.shape[1], device=clean.device)
        return self.criterion.compare(clean, enhanced, lengths, keys)

    def backward(self, noisy: Tensor, clean: Tensor, keys: Sequence[str], clock: Clock) -> None:
        """Compute the gradients of a batch."""
        with clock.phase("enhancement"):
            enhanced = self.enhancer(noisy, torch.full((len(noisy),), noisy.shape[1]))
        with clock.phase("loss"), timed_features(self.criterion, clock):
            loss = self.loss(clean, enhanced, keys).mean()
        with clock.phase("backward"):
            loss.backward()


class OneByOne(Posinv):
    """The straightforward way."""

    name = "one by one"

    def __init__(self, enhancer: Demucs, criterion: SSLCriterion, kind: str) -> None:
        super().__init__(enhancer, criterion)
        self.kind = kind

    def features(self, wave: Tensor) -> Tensor:
        """Return the SSL features (F, D) of one waveform (T,)."""
        return self.criterion.upstream.module.model(wave[None]).last_hidden_state[0]

    def backward(self, noisy: Tensor, clean: Tensor, keys: Sequence[str], clock: Clock) -> None:
        """Accumulate the gradients of a batch's utterances."""
        for n, s, key in zip(noisy, clean, keys, strict=True):
            with clock.phase("enhancement"):
                enhanced = self.enhancer(n[None], torch.tensor([len(n)]))[0]
            with clock.phase("loss"):
                reference, hops = self.reference(s, key)
            with clock.phase("clean"), torch.no_grad():
                x = self.features(reference)
            with clock.phase("enhanced"):
                x_enh = self.features(enhanced)
            with clock.phase("loss"):
                loss = self.compare(x, x_enh, hops) / len(noisy)
            with clock.phase("backward"):
                loss.backward()

    def reference(self, clean: Tensor, key: str) -> tuple[Tensor, int]:
        """Return the reference (T',) of clean speech (T,), and the frames of padding in front."""
        if self.kind == "ssl_mse_pad":
            length = torch.tensor([len(clean)])
            padded, _, hops = self.criterion.zero_pad(clean[None], length, [key])
            return padded[0], int(hops[0])
        if self.kind == "ssl_softdtw":
            factor = float(random_state(key, "speed").choice(self.criterion.speed.factors))
            x = librosa.resample(
                clean.cpu().numpy(), orig_sr=SAMPLING_RATE * factor, target_sr=SAMPLING_RATE
            )
            return torch.from_numpy(np.ascontiguousarray(x)).to(clean), 0
        return clean, 0

    def compare(self, x: Tensor, x_enh: Tensor, hops: int) -> Tensor:
        """Return the loss of one utterance's features."""
        if self.kind != "ssl_softdtw":
            return (x[hops : hops + len(x_enh)] - x_enh).square().sum(1).mean()
        pair = [F.normalize(z, dim=1)[None].cpu() for z in (x_enh, x)]
        return naive_divergence(pair, self.criterion.loss.gamma)[0].to(x.device)


class timed_features:  # noqa: N801  # a context manager
    """Inside the block, time a criterion's forwards of the SSL model."""

    def __init__(self, criterion: SSLCriterion, clock: Clock) -> None:
        self.criterion, self.clock = criterion, clock

    def __enter__(self) -> None:
        features = self.criterion.features

        def timed(waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            with self.clock.phase("enhanced" if torch.is_grad_enabled() else "clean"):
                return features(waves, lengths)

        self.criterion.features = timed

    def __exit__(self, *error: object) -> None:
        del self.criterion.features


class Bench:
    """The two models, the optimiser, and a batch of noisy and clean speech."""

    def __init__(self, enhancer: Demucs, device: torch.device, seconds: float, count: int) -> None:
        self.enhancer, self.device = enhancer.to(device).train(), device
        self.optimizer = torch.optim.Adam(enhancer.parameters(), lr=1e-4)
        samples = round(seconds * SAMPLING_RATE)
        clean = np.stack([speech_like(seed, samples) for seed in range(count)])
        noise = np.random.default_rng(0).standard_normal(clean.shape) * 0.05
        self.clean = torch.from_numpy(clean).float().to(device)
        self.noisy = torch.from_numpy(clean + noise).float().to(device)

    def check(self, posinv: Posinv, other: OneByOne) -> float:
        """Return the relative difference of the two implementations' losses of one utterance.

        Raises:
            InputError: the difference is larger than the tolerance.
        """
        clean, key = self.clean[:1], ["at speed 1"]
        while other.kind == "ssl_softdtw" and random_state(key[0], "speed").choice([0, 1, 2]) != 1:
            key = [f"{key[0]} "]  # the two resample differently
        with torch.no_grad():
            found = posinv.loss(clean, self.noisy[:1], key)[0]
            reference, hops = other.reference(clean[0], key[0])
            features = other.features(reference), other.features(self.noisy[0])
            expected = other.compare(*features, hops)
        difference = ((found - expected) / expected).abs().item()
        if not difference <= TOLERANCE:
            raise InputError(
                f"posinv's {other.kind} of one utterance is {found:.6f}, the other way's"
                f" {expected:.6f}: their relative difference is more than {TOLERANCE:g}"
            )
        return difference

    def turn(self, implementation: Posinv, row: Row, updates: int, warm_up: bool) -> None:
        """Measure updates; before these, one that is not counted, to warm up."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for count in ((1,) if warm_up else ()) + (updates,):
            clock = Clock(self.device, PHASES)
            self._wait()
            start = time.perf_counter()
            for _ in range(count):
                keys = [f"{len(row.wall)}-{b}" for b in range(len(self.clean))]
                clock.begin()
                implementation.backward(self.noisy, self.clean, keys, clock)
                with clock.phase("optimiser"):
                    torch.nn.utils.clip_grad_norm_(self.enhancer.parameters(), 5.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self._wait()
            wall = (time.perf_counter() - start) / count
        print(f"{row.name}: {wall:.1f} s an update", file=sys.stderr)
        row.wall.append(wall)
        seconds = clock.seconds()
        if type(implementation) is Posinv:  # the features are timed inside the loss
            seconds[:, 3] -= seconds[:, 1] + seconds[:, 2]
        row.seconds.append(seconds)
        if self.device.type == "cuda":
            row.peak = torch.cuda.max_memory_allocated()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def record(row: Row, utterances: int, posinv: Row) -> list[str]:
    """Return the cells of COLUMNS."""
    return [*row.name.split(", "), str(utterances), *row.cells(posinv)]


def kept_references(kind: str, row: Row, width: int) -> str:
    """Return what keeping clean features from epoch to epoch would save and cost."""
    share = np.median(np.concatenate(row.seconds), axis=0)[1] / row.update
    gigabytes = HOUR_OF_FRAMES * width * 4 / 1e9
    if kind != "ssl_mse":
        return f"- {kind}: the clean reference is {share:.0%} of an update, another each epoch\n"
    return (
        f"- {kind}: the clean reference is {share:.0%} of an update; its features, kept from epoch"
        f" to epoch, would save that and take {gigabytes:.2f} GB an hour of speech in float32\n"
    )


def main() -> None:
    """Measure, write the CSV and the plot, and print the table."""
    parser = benchmark_parser(__doc__, "tiny models, to test the script itself")
    add = parser.add_argument
    add("--model", choices=CONFIGS, default="hubert", help="Base model (default: hubert)")
    add("--utterances", type=int, default=1, help="utterances in an update (default: 1)")
    add("--seconds", type=float, default=12.0, help="length of an utterance (default: 12)")
    add("--updates", type=int, default=1, help="updates in a turn (default: 1)")
    add("--turns", type=int, default=2, help="turns of each implementation (default: 2)")
    add(
        "--criteria",
        nargs="+",
        choices=MEASURED,
        default=MEASURED,
        help=f"criteria to measure (default: {' '.join(MEASURED)})",
    )
    args = parser.parse_args()
    check_device(args.device)
    for name in ("utterances", "updates", "turns"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.seconds < 0.1:
        raise InputError(f"--seconds must be at least 0.1, got {args.seconds:g}")

    records, bars, settings = [], [], ""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ssl_config = CONFIGS[args.model](**(TINY_SSL if args.quick else {}))
        AutoModel.from_config(ssl_config).save_pretrained(folder)
        enhancer = Demucs(hidden=4) if args.quick else Demucs()
        bench = Bench(enhancer, torch.device(args.device), args.seconds, args.utterances)
        for kind in args.criteria:
            criterion = CRITERIA[kind](folder)
            ways = Posinv(enhancer, criterion), OneByOne(enhancer, criterion, kind)
            difference = bench.check(*ways)
            settings += f"- {kind}: the two losses differ by {difference:.1e} of their value\n"
            rows = [Row(f"{kind}, {way.name}") for way in ways]
            for turn in range(args.turns):
                for way, row in zip(ways, rows, strict=True):
                    first = turn == 0 and kind == args.criteria[0]
                    bench.turn(way, row, args.updates, warm_up=first)
            settings += kept_references(kind, rows[0], ssl_config.hidden_size)
            records += [record(row, args.utterances, rows[0]) for row in rows]
            bars += rows

    sizes = "tiny models" if args.quick else f"master64 and {SSL_MODELS[args.model]} sizes"
    settings = (
        f"- settings: {sizes}, {args.utterances} utterances of {args.seconds:g} s,"
        f" {torch.get_num_threads()} threads, float32, float32_matmul_precision"
        f" {torch.get_float32_matmul_precision()}\n" + settings
    )
    name = f"enh_{args.model}_{args.device}"
    write_benchmark(args.out / f"{name}.csv", settings, COLUMNS, records)
    title = f"An update of SE fine-tuning, master64 and {SSL_MODELS[args.model]}, {args.device}"
    plot_phases(bars, PHASES, title, args.out / f"{name}.png")


if __name__ == "__main__":
    run(main)
