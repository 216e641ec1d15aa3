"""Compare the speed of LASER's updates in posinv and in its authors' way, in one run.

An update makes two views of each utterance, computes their SSL features, the loss and its gradient,
and does a step of AdamW. "posinv" is posinv.models.ssft.SSFTModel as ssft_train runs it, with a
batch of pairs at a time. "authors" is our own code for the authors' way: one pair at a time, with
accumulated gradients; views from librosa on the CPU, one by one; one waveform at a time through the
SSL model; a loss that makes the tensor of all differences of frames, and a scalar loop over the
cells of the alignments on the CPU. Both train the same layers of the same model, with the preset's
float32_matmul_precision. The model has the size of HuBERT-Base or WavLM-Base, and random weights.
Before the measurement, both losses of the same two views are compared in full float32.

The audio comes from FLAC files: those of --flac, or pink noise with the loudness changes of speech,
which the script makes. The implementations take turns. On a GPU, CUDA events time the phases, so
that no update waits for the GPU; "update" is the wall-clock time of all updates, divided by their
number.
"""

import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_softdtw import naive_divergence
from benchmark import (
    Clock,
    Row,
    benchmark_parser,
    check_device,
    plot_phases,
    write_benchmark,
    write_flac,
)
from tiny_ssl import TINY_SSL
from torch import Tensor
from transformers import AutoModel, HubertConfig, WavLMConfig

from posinv.augment.draws import random_state
from posinv.bin.cli import run
from posinv.data.audio import SAMPLING_RATE, read_audio
from posinv.data.files import read_yaml
from posinv.errors import InputError
from posinv.models.ssft import SSFTModel

TOLERANCE = 1e-4
CONFIGS = {"hubert": HubertConfig, "wavlm": WavLMConfig}  # their defaults are the Base models
SSL_MODELS = {"hubert": "HuBERT-Base", "wavlm": "WavLM-Base"}
PHASES = ("load", "views", "features", "loss", "backward", "optimiser")
COLUMNS = (
    *("implementation", "pairs", "updates", "update_ms", "min_ms", "max_ms", "times_posinv"),
    *(f"{phase}_ms" for phase in PHASES),
    "peak_MiB",
)

Batch = tuple[Tensor, list[int], list[str]]  # waveforms (B, T), lengths, utterance ids


class Posinv:
    """SSFTModel's update: the same steps as :meth:`SSFTModel.forward`, with the phases timed."""

    name = "posinv"

    def __init__(self, model: SSFTModel, bf16: bool) -> None:
        self.model, self.bf16 = model, bf16

    def backward(self, batch: Batch, clock: Clock) -> None:
        """Compute the gradients of a batch."""
        waves, lengths, keys = batch
        device = self.model.projection.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            with clock.phase("views"):
                waves, lengths = waves.to(device, non_blocking=True), torch.tensor(lengths)
                view, view_lengths = self.model.perturb(waves, lengths, keys)
            with clock.phase("features"):
                both = torch.nn.utils.rnn.pad_sequence([*waves, *view], batch_first=True)
                hidden, frames = self.model.features(both, torch.cat([lengths, view_lengths]))
                z = F.normalize(self.model.projection(hidden).float(), dim=2)
            with clock.phase("loss"):
                losses = self.model.pair_losses(*z.chunk(2), *frames.chunk(2))
                loss = (losses[0] + self.model.alpha * losses[1]).mean()
        with clock.phase("backward"):
            loss.backward()


class Authors:
    """The authors' update of the same model."""

    name = "authors"

    def __init__(self, model: SSFTModel, speeds: Sequence[float], semitones: Sequence[float]):
        self.model, self.speeds, self.semitones = model, speeds, semitones

    def backward(self, batch: Batch, clock: Clock) -> None:
        """Accumulate the gradients of a batch's pairs."""
        device = self.model.projection.weight.device
        for wave, length, key in zip(*batch, strict=True):
            with clock.phase("views"):
                views = [v.to(device) for v in (wave[:length], self.view(wave[:length], key))]
            with clock.phase("features"):
                x, y = (self.features(view) for view in views)
            with clock.phase("loss"):
                loss = self.loss(x, y) / len(batch[1])
            with clock.phase("backward"):
                loss.backward()

    def view(self, wave: Tensor, key: str) -> Tensor:
        """Return one waveform at another speed and pitch."""
        import librosa

        speed = random_state(key, "speed").choice(self.speeds)
        shift = random_state(key, "pitch").choice(self.semitones)
        x = librosa.resample(wave.numpy(), orig_sr=SAMPLING_RATE * speed, target_sr=SAMPLING_RATE)
        shifted = librosa.effects.pitch_shift(x, sr=SAMPLING_RATE, n_steps=shift)
        return torch.from_numpy(np.ascontiguousarray(shifted, np.float32))

    def features(self, wave: Tensor) -> Tensor:
        """Return the features (F, D) of one waveform."""
        hidden = self.model.upstream.model(wave[None]).last_hidden_state
        return F.normalize(self.model.projection(hidden)[0], dim=1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of one pair."""
        alignment = naive_divergence([x[None].cpu(), y[None].cpu()], self.model.alignment.gamma)
        regulariser = self._regulariser(x) + self._regulariser(y)
        return alignment[0].to(x.device) + self.model.alpha * regulariser

    def _regulariser(self, x: Tensor) -> Tensor:
        margin, window = self.model.regulariser.margin, self.model.regulariser.window
        frame = torch.arange(len(x), device=x.device)
        lag = (frame[:, None] - frame).abs()
        squared = (x[:, None] - x[None]).square().sum(2)
        distance = torch.where(lag > 0, squared, 1.0).sqrt() * (lag > 0)
        weight = lag.square() + 1
        far = (lag > window) * weight * (margin - distance).clamp(min=0)
        return (far + (lag <= window) * distance / weight).sum() / len(x) ** 2


class Flac(torch.utils.data.Dataset):
    """Waveforms of FLAC files, cut to one length; after the last file, the first comes again."""

    def __init__(self, files: Sequence[Path], samples: int, size: int) -> None:
        self.files, self.samples, self.size = files, samples, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        path = self.files[index % len(self.files)]
        wave = read_audio(str(path), SAMPLING_RATE)[: self.samples]
        return f"{path.stem}-{index}", torch.from_numpy(wave)


def collate(items: Sequence[tuple[str, Tensor]]) -> Batch:
    """Pad a batch."""
    keys, waves = zip(*items, strict=True)
    padded = torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
    return padded, [len(wave) for wave in waves], list(keys)


class Bench:
    """A model, its optimiser, and audio."""

    def __init__(
        self,
        model: SSFTModel,
        device: torch.device,
        files: Sequence[Path],
        samples: int,
        pairs: int,
    ) -> None:
        self.model, self.device = model.to(device), device
        self.files, self.samples, self.pairs = files, samples, pairs
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-5)

    def batches(self, count: int, pairs: int) -> Iterator[Batch]:
        """Read ``count`` batches; on a GPU machine, in other processes."""
        on_gpu = self.device.type == "cuda"
        return iter(
            torch.utils.data.DataLoader(
                Flac(self.files, self.samples, count * pairs),
                pairs,
                collate_fn=collate,
                num_workers=4 if on_gpu else 0,
                pin_memory=on_gpu,
            )
        )

    def check(self, posinv: Posinv, authors: Authors) -> float:
        """Return the relative difference of the two implementations' losses of one pair.

        Raises:
            InputError: the difference is larger than the tolerance.
        """
        self.model.eval()
        waves, lengths, keys = next(self.batches(1, 1))
        waves, lengths = waves.to(self.device), torch.tensor(lengths)
        with torch.no_grad():
            view, view_lengths = self.model.perturb(waves, lengths, keys)
            expected = authors.loss(
                authors.features(waves[0]), authors.features(view[0, : view_lengths[0]])
            )
            found = self.model(waves, lengths, keys)[0]
        self.model.train()
        difference = ((found - expected) / expected).abs().item()
        if not difference <= TOLERANCE:
            raise InputError(
                f"posinv's loss of one pair is {found:.6f}, the authors' {expected:.6f}: their"
                f" relative difference is more than {TOLERANCE:g}"
            )
        return difference

    def turn(self, implementation: Posinv | Authors, row: Row, updates: int, pairs: int) -> None:
        """Run one update that is not counted, then measure ``updates`` more."""
        clock = Clock(self.device, PHASES)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batches = self.batches(updates + 1, pairs)
        for update in range(updates + 1):
            if update == 1:
                self._wait()
                clock = Clock(self.device, PHASES)
                start = time.perf_counter()
            clock.begin()
            with clock.phase("load"):
                batch = next(batches)
            implementation.backward(batch, clock)
            with clock.phase("optimiser"):
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._wait()
        row.wall.append((time.perf_counter() - start) / updates)
        row.seconds.append(clock.seconds())
        if self.device.type == "cuda":
            row.peak = torch.cuda.max_memory_allocated()

    def largest(self, implementation: Posinv) -> int:
        """Return the largest number of pairs that fits into the GPU's memory."""
        fits, too_many = self.pairs, None
        while too_many is None or too_many - fits > max(1, fits // 16):
            pairs = 2 * fits if too_many is None else (fits + too_many) // 2
            try:
                self.turn(implementation, Row(""), 1, pairs)
                fits = pairs
            except torch.OutOfMemoryError:
                too_many = pairs
                self.optimizer.zero_grad()
            torch.cuda.empty_cache()
        return fits

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def record(row: Row, pairs: int, posinv: Row) -> list[str]:
    """Return the cells of COLUMNS."""
    return [row.name, str(pairs), *row.cells(posinv)]


def main() -> None:
    """Measure, write the CSV and the plot, and print the table."""
    parser = benchmark_parser(__doc__, "a tiny model, to test the script itself")
    add = parser.add_argument
    add("--model", choices=CONFIGS, default="hubert", help="Base model (default: hubert)")
    add("--pairs", type=int, help="pairs in an update (default: 1 on a CPU, 8 on a GPU)")
    add("--seconds", type=float, default=12.0, help="length of an utterance (default: 12)")
    add("--updates", type=int, help="posinv's updates in three turns (default: 3; GPU: 300)")
    add("--flac", type=Path, help="folder of FLAC files at 16 kHz, searched at any depth")
    add("--bf16", action="store_true", help="bfloat16, as ssft_train --use_amp true on a GPU")
    add(
        "--float32_matmul_precision",
        choices=("highest", "high", "medium"),
        help="precision of both, see ssft_train --help (default: the preset's)",
    )
    args = parser.parse_args()
    check_device(args.device)
    on_gpu = args.device == "cuda"
    pairs = args.pairs or (8 if on_gpu else 1)
    updates = args.updates or (300 if on_gpu else 3)
    turns = 3
    samples = round(args.seconds * SAMPLING_RATE)

    config = read_yaml(
        Path(__file__).parents[1] / "conf" / f"laser_{args.model}.yaml", "the preset"
    )
    preset = config["model_conf"]
    precision = args.float32_matmul_precision or config["float32_matmul_precision"]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ssl_config = CONFIGS[args.model](**(TINY_SSL if args.quick else {}))
        AutoModel.from_config(ssl_config).save_pretrained(f"{folder}/ssl")
        model = SSFTModel(f"{folder}/ssl", **preset).train()
        if args.flac:
            files = sorted(args.flac.rglob("*.flac"))
            if not files:
                raise InputError(f"--flac {args.flac}: no .flac file there")
        else:
            files = write_flac(Path(folder), 16, samples)
        bench = Bench(model, torch.device(args.device), files, samples, pairs)
        views = preset["views"]
        implementations = [
            Posinv(model, args.bf16),
            Authors(model, views["speed"], views["semitones"]),
        ]
        difference = bench.check(*implementations)
        torch.set_float32_matmul_precision(precision)
        if importlib.util.find_spec("librosa") is None:
            del implementations[1]
        rows = [Row(implementation.name) for implementation in implementations]
        for _ in range(turns):
            for implementation, row in zip(implementations, rows, strict=True):
                count = -(-updates // turns) if row.name == "posinv" else 1
                bench.turn(implementation, row, count, pairs)
        largest = bench.largest(implementations[0]) if on_gpu else None

    settings = (
        f"- settings: size of {SSL_MODELS[args.model]}{', tiny' * args.quick}, {pairs} pairs of"
        f" {args.seconds:g} s, {torch.get_num_threads()} threads,"
        f" {'bfloat16' if args.bf16 else 'float32'}, float32_matmul_precision {precision}\n"
        f"- the two losses of the same views differ by {difference:.1e} of their value\n"
        f"- 3,600 updates of posinv take {60 * rows[0].update:.0f} min\n"
    )
    if len(rows) == 1:
        settings += "- no librosa: the authors' way is left out\n"
    if largest:
        settings += f"- largest number of pairs that fits into the GPU's memory: {largest}\n"
    name = f"ssft_{args.model}_{args.device}{'_bf16' * args.bf16}"
    records = [record(row, pairs, rows[0]) for row in rows]
    write_benchmark(args.out / f"{name}.csv", settings, COLUMNS, records)
    title = f"LASER's update, {SSL_MODELS[args.model]}, {args.device}"
    plot_phases(rows, PHASES, title, args.out / f"{name}.png")


if __name__ == "__main__":
    run(main)
