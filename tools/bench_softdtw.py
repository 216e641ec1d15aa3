"""Compare the speed of posinv's soft-DTW and of other implementations, in one run.

Each case computes value and gradient:

loop      of a batch of cost matrices, as in a training: torch has just made them, in fresh memory,
          and its threads have not come to rest (CPU only)
cost      of a batch of cost matrices
features  of the soft-DTW divergence of two batches of feature sequences; gradients of both
batch     as cost, for several numbers of utterances
frames    as cost, for several numbers of frames, N = M

The other implementations are optional; pip installs them: pysdtw, tslearn and, on a GPU,
dtw-loss-functions. "naive" is our own code for the way in which LASER's authors compute the
divergence: one pair at a time, with the (N, M, D) tensor of differences and a scalar loop over the
cells of its three alignments.

"floor", beside the features, is what the divergence cannot do without, on the same matrices: six
batched products of torch, two to make the costs and four for the gradients, and two alignments of
given costs. The products and alignments of a sequence with itself are symmetric: half of each.

The implementations take turns, so that changes of the machine's load affect all of them. Before
each measurement the script does one run that is not counted. But for "loop", it waits before that
until the threads of the implementation before are idle. The errors are those of the first
utterance's value and gradient, relative to the largest of each. They are measured against posinv's
float64 reference or, for more than 400,000 cells, against its back end "torch" in float64. posinv's
errors must not exceed 1e-4.
"""

import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numba
import numpy as np
import torch
from benchmark import benchmark_parser, check_device, write_benchmark
from matplotlib.figure import Figure
from torch import Tensor

import posinv
from posinv.bin.cli import run
from posinv.errors import InputError
from posinv.report.curves import save_figure
from posinv.report.results import ABSENT
from posinv.softdtw import SoftDTWLoss, soft_dtw

TOLERANCE = 1e-4
REFERENCE_CELLS = 400_000
REST = 0.02  # seconds; OpenMP's threads may still spin for so long after the implementation before
DIMENSION = 256
COLUMNS = (
    *("case", "implementation", "version", "B", "N", "M", "runs", "median_ms", "min_ms", "max_ms"),
    *("ns_per_cell", "times_posinv", "value_error", "gradient_error", "note"),
)

# From inputs, whose gradients are computed, and gamma to values (B,).
Loss = Callable[[Sequence[Tensor], float], Tensor]


@dataclass(frozen=True)
class Implementation:
    """Functions to time: ``cost`` takes (cost,), ``divergence`` (x, y); None: it has none."""

    name: str
    version: str
    cost: Loss | None = None
    divergence: Loss | None = None
    one_by_one: bool = False


@dataclass(frozen=True)
class Size:
    """The size of a case: B pairs of N and M frames."""

    B: int
    N: int
    M: int

    @property
    def cells(self) -> int:
        """Number of cells of all cost matrices together."""
        return self.B * self.N * self.M


@dataclass(frozen=True)
class Row:
    """One implementation's times in one case, in seconds, or a note why there are none."""

    case: str
    name: str
    version: str
    size: Size
    seconds: tuple[float, ...] = ()
    errors: tuple[float, float] = (math.nan, math.nan)
    note: str = ""

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Plan:
    """Sizes of the cases; number of repeats and time limit."""

    main: Size
    batches: tuple[int, ...]
    frames: tuple[int, ...]
    repeats: int
    seconds: float  # time limit for one implementation in one case, two runs apart


FULL = Plan(Size(8, 600, 560), (1, 2, 4, 8, 16), (100, 200, 400, 1000, 2000, 4000), 30, 2.0)
QUICK = Plan(Size(2, 30, 28), (1, 2), (10, 40), 2, 0.1)


def implementations(device: str) -> list[Implementation | tuple[str, str]]:
    """Return the installed implementations; for others (name, note that says what is missing)."""
    found: list[Implementation | tuple[str, str]] = [
        Implementation(
            "posinv",
            posinv.__version__,
            lambda inputs, gamma: soft_dtw(inputs[0], gamma=gamma),
            lambda inputs, gamma: SoftDTWLoss(gamma)(*inputs),
        )
    ]
    makers = {"pysdtw": _pysdtw, "tslearn": _tslearn}
    if device == "cuda":
        makers["dtw-loss-functions"] = _dtw_loss_functions
    for package, make in makers.items():
        try:
            found += make(metadata.version(package), device)
        except (ImportError, metadata.PackageNotFoundError) as error:
            found.append((package, f"not installed: pip install {package} ({error})"))
    return [*found, Implementation("naive", ABSENT, divergence=naive_divergence, one_by_one=True)]


def _of_three(soft_dtw_of: Callable[[Tensor, Tensor, float], Tensor]) -> Loss:
    """Return the divergence, computed as three alignments."""

    def divergence(inputs: Sequence[Tensor], gamma: float) -> Tensor:
        x, y = inputs
        of_selves = soft_dtw_of(x, x, gamma) + soft_dtw_of(y, y, gamma)
        return soft_dtw_of(x, y, gamma) - 0.5 * of_selves

    return divergence


def _of_cost(module: Callable[..., torch.nn.Module]) -> Loss:
    """Return soft-DTW of a cost, from a module that takes features and a distance function."""

    def value(inputs: Sequence[Tensor], gamma: float) -> Tensor:
        (cost,) = inputs
        x, y = cost.new_zeros(*cost.shape[:2], 1), cost.new_zeros(len(cost), cost.shape[2], 1)
        return module(gamma=gamma, dist_func=lambda x, y: cost)(x, y)

    return value


def _pysdtw(version: str, device: str) -> list[Implementation]:
    module = functools.partial(importlib.import_module("pysdtw").SoftDTW, use_cuda=device == "cuda")
    of = _of_three(lambda x, y, gamma: module(gamma=gamma)(x, y))
    return [Implementation("pysdtw", version, _of_cost(module), of)]


def _tslearn(version: str, device: str) -> list[Implementation]:
    module = importlib.import_module("tslearn.metrics").SoftDTWLossPyTorch
    of = _of_three(lambda x, y, gamma: module(gamma=gamma)(x, y))
    return [Implementation("tslearn", version, _of_cost(module), of)]


def _dtw_loss_functions(version: str, device: str) -> list[Implementation]:
    """Return the package's two CUDA implementations: Maghoumi's and sdtw-cuda-torch."""
    package = "dtw_loss_functions.soft_dtw_implementations"
    maghoumi = functools.partial(
        importlib.import_module(f"{package}.soft_dtw_cuda_mag").SoftDTW, use_cuda=True
    )
    autograd = importlib.import_module(f"{package}.soft_dtw_cuda_ron.autograd").SoftDTWAutograd
    fused = importlib.import_module(f"{package}.soft_dtw_cuda_ron.module").SoftDTW
    return [
        Implementation(
            "Maghoumi",
            version,
            _of_cost(maghoumi),
            _of_three(lambda x, y, gamma: maghoumi(gamma=gamma)(x, y)),
        ),
        Implementation(
            "sdtw-cuda-torch",
            version,
            lambda inputs, gamma: autograd.apply(inputs[0], gamma, None),
            _of_three(lambda x, y, gamma: fused(gamma=gamma)(x, y)),
        ),
    ]


@numba.njit
def _scalar_forward(cost: np.ndarray, gamma: float) -> np.ndarray:
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for i in range(n):
        for j in range(m):
            a, b, c = total[i, j], total[i, j + 1], total[i + 1, j]
            low = min(a, b, c)
            share = math.exp((low - a) / gamma) + math.exp((low - b) / gamma)
            share += math.exp((low - c) / gamma)
            total[i + 1, j + 1] = cost[i, j] + low - gamma * math.log(share)
    return total


@numba.njit
def _scalar_backward(cost: np.ndarray, total: np.ndarray, gamma: float) -> np.ndarray:
    n, m = cost.shape
    alignment = np.zeros((n, m))
    alignment[-1, -1] = 1
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            for k, o in ((i + 1, j + 1), (i + 1, j), (i, j + 1)):
                if k < n and o < m:
                    excess = total[k + 1, o + 1] - cost[k, o] - total[i + 1, j + 1]
                    alignment[i, j] += alignment[k, o] * math.exp(excess / gamma)
    return alignment


class _ScalarSoftDTW(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost: Tensor, gamma: float) -> Tensor:
        ctx.cost, ctx.gamma, ctx.like = cost.detach().cpu().numpy(), gamma, cost
        ctx.total = _scalar_forward(ctx.cost, gamma)
        return cost.new_tensor(ctx.total[-1, -1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        alignment = _scalar_backward(ctx.cost, ctx.total, ctx.gamma)
        return grad * torch.from_numpy(alignment).to(ctx.like), None


def naive_divergence(inputs: Sequence[Tensor], gamma: float) -> Tensor:
    """Return the divergence (B,), each pair computed as LASER's authors do."""

    def of(x: Tensor, y: Tensor, gamma: float) -> Tensor:
        return _ScalarSoftDTW.apply((x[:, None] - y[None]).square().sum(2), gamma)

    pairs = zip(*inputs, strict=True)
    return torch.stack([_of_three(of)(pair, gamma) for pair in pairs])


def _value_and_gradients(
    implementation: Implementation, loss: Loss, inputs: Sequence[Tensor], gamma: float
) -> tuple[Tensor, list[Tensor]]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    parts = [inputs]
    if implementation.one_by_one:
        parts = [[tensor[b : b + 1] for tensor in inputs] for b in range(len(inputs[0]))]
    values = []
    for part in parts:
        values.append(loss(part, gamma))
        values[-1].sum().backward()
    return torch.cat(values).detach(), [tensor.grad for tensor in inputs]


def _truth(case: str, inputs: Sequence[Tensor], gamma: float) -> tuple[Tensor, list[Tensor]]:
    """Return value and gradients of the first utterance, in float64 on the CPU."""
    first = [tensor[:1].cpu().double() for tensor in inputs]
    cells = first[0].shape[1] * first[-1].shape[1 if case == "features" else 2]
    backend = "reference" if cells <= REFERENCE_CELLS else "torch"
    if case == "features":
        loss = SoftDTWLoss(gamma, backend=backend)
        truth = Implementation("truth", "", divergence=lambda inputs, gamma: loss(*inputs))
        return _value_and_gradients(truth, truth.divergence, first, gamma)
    truth = Implementation(
        "truth", "", lambda inputs, gamma: soft_dtw(*inputs, gamma=gamma, backend=backend)
    )
    return _value_and_gradients(truth, truth.cost, first, gamma)


def _errors(
    result: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]]
) -> tuple[float, float]:
    (value, gradients), (true_value, true_gradients) = result, truth
    of_gradients = [
        ((gradient[:1].cpu() - true).abs().max() / true.abs().max()).item()
        for gradient, true in zip(gradients, true_gradients, strict=True)
    ]
    return ((value[0].cpu() - true_value[0]) / true_value[0]).abs().item(), max(of_gradients)


class Bench:
    """Measures all implementations on a device, case by case."""

    def __init__(self, device: str, threads: int, gamma: float, plan: Plan) -> None:
        self.device, self.threads, self.gamma, self.plan = device, threads, gamma, plan
        self.implementations = implementations(device)
        self.truths: dict[tuple[bool, int, int], tuple[Tensor, list[Tensor]]] = {}

    def floor(self, size: Size) -> Implementation:
        """Return the products and alignments of the divergence, as a function of the features."""
        cost = torch.rand(size.B, size.N, size.M, device=self.device)
        made = torch.empty_like(cost)

        def run(inputs: Sequence[Tensor], gamma: float) -> Tensor:
            x, y = (tensor.detach() for tensor in inputs)
            out = torch.empty_like(x), torch.empty_like(y)
            for _ in range(2):
                torch.bmm(x, y.mT, out=made)
                torch.bmm(made, y, out=out[0])
                torch.bmm(made.mT, x, out=out[1])
            for _ in range(2):
                given = cost.detach().requires_grad_()
                soft_dtw(given, gamma=gamma).sum().backward()
            return inputs[0][:, 0, 0] + inputs[1][:, 0, 0]  # has gradients

        return Implementation("floor", ABSENT, divergence=run)

    def inputs(self, case: str, size: Size) -> list[Tensor]:
        """Return random costs in [0, 1), or random features with unit norm."""
        generator = torch.Generator().manual_seed(0)
        if case != "features":
            cost = torch.rand(size.B, size.N, size.M, generator=generator)
            return [cost.to(self.device)]
        features = (
            torch.randn(size.B, frames, DIMENSION, generator=generator)
            for frames in (size.N, size.M)
        )
        return [torch.nn.functional.normalize(x, dim=2).to(self.device) for x in features]

    def timed(
        self, implementation: Implementation, loss: Loss, inputs: Sequence[Tensor]
    ) -> tuple[float, tuple[Tensor, list[Tensor]]]:
        """Return the seconds of one run, and its results."""
        torch.set_num_threads(self.threads)  # numba's threads change torch's number
        self._wait()
        start = time.perf_counter()
        result = _value_and_gradients(implementation, loss, inputs, self.gamma)
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, case: str, size: Size, expected: dict[str, float] | None = None) -> list[Row]:
        """Time every implementation that can do the case.

        Args:
            case: name of the case.
            size: its size.
            expected: seconds per cell of each implementation at the size before. Implementations
                that would exceed the plan's time limit are left out; the others' values are
                updated.
        """
        inputs = self.inputs(case, size)

        def ready() -> Sequence[Tensor]:
            return [tensor * 1 for tensor in inputs] if case == "loop" else inputs

        known = case == "features", size.N, size.M  # the first utterance depends on these alone
        if known not in self.truths:
            self.truths[known] = _truth(case, inputs, self.gamma)
        rows: dict[str, Row] = {}
        turns: list[tuple[Implementation, Loss, int]] = []
        for implementation in self.implementations:
            if isinstance(implementation, tuple):
                name, note = implementation
                rows[name] = Row(case, name, ABSENT, size, note=note)
                continue
            name = implementation.name
            loss = implementation.divergence if case == "features" else implementation.cost
            if loss is None:
                continue
            row = functools.partial(Row, case, name, implementation.version, size)
            if expected and expected.get(name, 0) * size.cells > self.plan.seconds:
                rows[name] = row(note=f"left out: over {self.plan.seconds:g} s expected")
                continue
            try:
                self.timed(implementation, loss, self.inputs(case, Size(2, 5, 4)))  # compiles
                seconds, result = self.timed(implementation, loss, inputs)
            except Exception as error:
                if name == "posinv":
                    raise
                lines = str(error).strip().splitlines() or [""]
                rows[name] = row(note=f"failed: {type(error).__name__}: {lines[0]}")
                continue
            errors = _errors(result, self.truths[known])
            if name == "posinv" and not max(errors) <= TOLERANCE:
                raise InputError(
                    f"posinv's {case} of {size} is wrong: relative errors of {errors[0]:.1e} in the"
                    f" value and {errors[1]:.1e} in the gradient, more than {TOLERANCE:g}"
                )
            rows[name] = row(errors=errors)
            repeats = min(self.plan.repeats, max(1, int(self.plan.seconds / seconds)))
            turns.append((implementation, loss, repeats))
        if case == "features":
            floor = self.floor(size)
            assert floor.divergence is not None
            rows["floor"] = Row(case, "floor", ABSENT, size)
            turns.append((floor, floor.divergence, self.plan.repeats))
        times: dict[str, list[float]] = {implementation.name: [] for implementation, _, _ in turns}
        for turn in range(self.plan.repeats):
            for implementation, loss, repeats in turns:
                if turn < repeats:
                    if case != "loop":
                        time.sleep(REST)
                    if repeats > 1:
                        self.timed(implementation, loss, inputs)  # starts its own threads
                    seconds, _ = self.timed(implementation, loss, ready())
                    times[implementation.name].append(seconds)
        for name, seconds in times.items():
            rows[name] = replace(rows[name], seconds=tuple(seconds))
            if expected is not None:
                expected[name] = rows[name].median / size.cells
        return list(rows.values())

    def run(self) -> list[Row]:
        """Measure all cases."""
        size = self.plan.main
        cases = ("cost", "features") if self.device == "cuda" else ("loop", "cost", "features")
        rows = [row for case in cases for row in self.measure(case, size)]
        expected: dict[str, float] = {}
        for batch in self.plan.batches:
            rows += self.measure("batch", replace(size, B=batch), expected)
        expected = {}
        for frames in self.plan.frames:
            rows += self.measure("frames", Size(2, frames, frames), expected)
        return rows


def record(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return the cells of COLUMNS, empty where nothing was measured."""
    size = [str(n) for n in (row.size.B, row.size.N, row.size.M)]
    figures = [""] * 8
    if row.seconds:
        ours = next(r for r in rows if (r.case, r.name, r.size) == (row.case, "posinv", row.size))
        figures = [
            str(len(row.seconds)),
            *(f"{1e3 * t:.3f}" for t in (row.median, min(row.seconds), max(row.seconds))),
            f"{1e9 * row.median / row.size.cells:.3f}",
            f"{row.median / ours.median:.2f}",
            *("" if math.isnan(error) else f"{error:.1e}" for error in row.errors),
        ]
    return [row.case, row.name, row.version, *size, *figures, row.note]


def growth(rows: Sequence[Row], case: str) -> dict[str, tuple[list[int], list[float], float]]:
    """Return how an implementation's time grows with the number of cells.

    Returns:
        For each implementation: sizes (B, or N = M), median seconds, and the exponent p in
        time = cells ** p, by least squares on the logarithms of the larger half of the sizes.
    """
    curves = {}
    for name in dict.fromkeys(row.name for row in rows if row.case == case and row.seconds):
        points = [row for row in rows if (row.case, row.name) == (case, name) and row.seconds]
        upper = points[-max(2, (len(points) + 1) // 2) :]
        exponent = math.nan
        if len(upper) > 1:
            cells, medians = ([r.size.cells for r in upper], [r.median for r in upper])
            exponent = np.polyfit(np.log(cells), np.log(medians), 1)[0]
        sizes = [row.size.B if case == "batch" else row.size.N for row in points]
        curves[name] = (sizes, [row.median for row in points], exponent)
    return curves


def plot(rows: Sequence[Row], title: str, out: Path) -> None:
    """Plot the time over B and over N = M."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, (case, label) in zip(
        figure.subplots(1, 2),
        {"batch": "utterances B", "frames": "frames N = M"}.items(),
        strict=True,
    ):
        for name, (sizes, medians, exponent) in growth(rows, case).items():
            milliseconds = [1e3 * median for median in medians]
            panel.loglog(sizes, milliseconds, "o-", label=f"{name}: cells$^{{{exponent:.2f}}}$")
        panel.set(xlabel=label, ylabel="value and gradient, ms")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    save_figure(figure, out)


def main() -> None:
    """Measure, write the CSV and the plot, and print the table."""
    parser = benchmark_parser(__doc__, "toy sizes, to test the script itself")
    add = parser.add_argument
    add(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="on the CPU (default: torch's)",
    )
    add("--gamma", type=float, default=0.1, help="smoothing of soft-DTW (default: 0.1)")
    args = parser.parse_args()
    check_device(args.device)
    if not (math.isfinite(args.gamma) and args.gamma > 0):
        raise InputError(f"--gamma must be above 0, got {args.gamma:g}")
    if not 1 <= args.threads <= numba.config.NUMBA_NUM_THREADS:
        raise InputError(
            f"--threads must be in 1..{numba.config.NUMBA_NUM_THREADS}, got {args.threads}"
        )
    numba.set_num_threads(args.threads)
    rows = Bench(args.device, args.threads, args.gamma, QUICK if args.quick else FULL).run()

    settings = f"- settings: {args.threads} threads, gamma {args.gamma:g}, float32, D {DIMENSION}\n"
    for case in ("batch", "frames"):
        for name, (_, _, exponent) in growth(rows, case).items():
            settings += f"- {case}: {name}'s time grows as cells to the power {exponent:.2f}\n"
    records = [record(row, rows) for row in rows]
    write_benchmark(args.out / f"softdtw_{args.device}.csv", settings, COLUMNS, records)
    plot(rows, f"Soft-DTW, {args.device}", args.out / f"softdtw_{args.device}.png")


if __name__ == "__main__":
    run(main)
