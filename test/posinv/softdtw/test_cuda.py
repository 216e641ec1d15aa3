"""The CUDA back end: its kernels emulated on the CPU, and on a GPU where there is one."""

import ctypes
import itertools
import math
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from softdtw_helpers import (
    check_no_overflow,
    check_not_finite,
    check_padding,
    check_ties,
    costs_of_lengths,
    outside,
    random_cost,
    run_back_end,
    valley_cost,
    value_and_gradient,
)

from posinv.errors import InputError
from posinv.losses import ContrastiveIDM
from posinv.softdtw import (
    SoftDTWLoss,
    cpu,
    cuda,
    soft_alignment,
    soft_dtw,
)

DTYPES = (torch.float32, torch.float64)


class Emulator:
    """Stands in for cuda._launch: emulator.cpp, compiled for each type of cost."""

    def __init__(self, folder: Path) -> None:
        source = Path(__file__).with_name("emulator.cpp")
        self.libraries = {}
        for dtype, flags in zip(DTYPES, ([], ["-DDOUBLE"]), strict=True):
            library = folder / f"{dtype}.so"
            command = ["g++", "-std=c++17", "-O2", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
            command += ["-shared", "-fPIC", *flags, "-I", str(Path(cuda.__file__).parent)]
            subprocess.run([*command, "-o", str(library), str(source)], check=True)
            self.libraries[dtype] = ctypes.CDLL(str(library))
            self.libraries[dtype].launch.restype = ctypes.c_char_p
        self.random = random.Random(0)
        self.launches = []

    def __call__(self, name, blocks, args):
        self.launches.append(name)
        resident, seed = self.random.randint(1, 5), self.random.getrandbits(32)
        values, types = cuda.as_parameters(args)
        boxes = [c_type(value) for c_type, value in zip(types, values, strict=True)]
        pointers = (ctypes.c_void_p * len(boxes))(*map(ctypes.addressof, boxes))
        launch = self.libraries[args[0].dtype].launch
        failure = launch(name.encode(), blocks, resident, seed, pointers)
        assert failure is None, f"{failure} ({resident} resident, seed {seed})"


@pytest.fixture(scope="module")
def compiled_emulator(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler (g++)")
    return Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(compiled_emulator, monkeypatch):
    monkeypatch.setattr(cuda, "_launch", compiled_emulator)
    monkeypatch.setattr(cuda, "_self_check", lambda device, dtype: None)
    return compiled_emulator


@pytest.fixture
def self_check(compiled_emulator, monkeypatch):
    """The self-check as in a new process, its kernels emulated."""
    monkeypatch.setattr(cuda, "_launch", compiled_emulator)
    monkeypatch.setattr(cuda, "_self_check", cache(cuda._self_check.__wrapped__))
    compiled_emulator.launches.clear()
    return compiled_emulator


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["emulated", "device"])
def align(request):
    """Values and alignments on the CPU, as computed by the CUDA back end."""
    where = "cpu"
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    else:
        where = request.getfixturevalue("device")

    def align(cost, x_lengths=None, y_lengths=None, gamma=1.0, bandwidth=None, band="slanted"):
        B, N, M = cost.shape
        x_lengths = torch.full((B,), N) if x_lengths is None else x_lengths
        y_lengths = torch.full((B,), M) if y_lengths is None else y_lengths
        args = (cuda, cost.to(where), x_lengths, y_lengths, gamma, bandwidth)
        value, alignment = run_back_end(*args, band=band)
        alone, _ = run_back_end(*args, with_alignment=False, band=band)
        assert torch.equal(alone.nan_to_num(), value.nan_to_num())
        return value.cpu(), alignment.cpu()

    return align


def full(cost):
    B, N, M = cost.shape
    return torch.full((B,), N), torch.full((B,), M)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 10.0])
@pytest.mark.parametrize(
    ("bandwidth", "band"),
    [(None, "slanted"), (3, "fixed"), (33, "fixed"), (0, "slanted"), (3, "slanted")],
)
def test_equals_the_cpu_back_end(align, dtype, tolerance, gamma, bandwidth, band):
    cost = random_cost(6, 97, 170, dtype=dtype)
    x_lengths = torch.tensor([97, 64, 1, 33, 32, 70])
    y_lengths = torch.tensor([170, 65, 2, 31, 1, 140])
    if band == "fixed":
        x_lengths = torch.minimum(x_lengths, y_lengths + bandwidth)
        y_lengths = torch.minimum(y_lengths, x_lengths + bandwidth)
    args = (x_lengths, y_lengths, gamma, bandwidth)
    value, alignment = align(cost, *args, band=band)
    expected_value, expected_alignment = run_back_end(cpu, cost.double(), *args, band=band)
    assert value.dtype == alignment.dtype == dtype
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alignment.double(), expected_alignment, rtol=0, atol=tolerance)
    assert (alignment[outside(cost, x_lengths, y_lengths, bandwidth, band)] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("m", [1, 31, 32, 33, 65])
def test_every_remainder_of_strips_and_chunks(align, n, m):
    cost = random_cost(1, n, m)
    for bandwidth, band in (
        *((None, "slanted"), (0, "slanted"), (9, "slanted")),
        *((abs(n - m), "fixed"), (abs(n - m) + 30, "fixed")),
    ):
        value, alignment = align(cost, gamma=0.1, bandwidth=bandwidth, band=band)
        expected = run_back_end(cpu, cost, *full(cost), 0.1, bandwidth, band=band)
        torch.testing.assert_close(value, expected[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(alignment, expected[1], rtol=0, atol=1e-11)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the examples share the emulator
)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 140), st.integers(1, 240)), min_size=1, max_size=2),
    bandwidth=st.none() | st.integers(0, 70),
    band=st.sampled_from(["slanted", "fixed"]),
    gamma=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    slab=st.none() | st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_lengths_band_and_order_of_execution(
    emulator, lengths, bandwidth, band, gamma, scale, slab, seed
):
    emulator.random.seed(seed)
    cost, x_lengths, y_lengths = costs_of_lengths(lengths, bandwidth, band, scale, seed)
    args = (cost, x_lengths, y_lengths, gamma, bandwidth)
    expected_value, expected_alignment = run_back_end(cpu, *args, band=band)
    with pytest.MonkeyPatch.context() as patch:
        if slab is not None:
            short_of_memory(patch, cost, slab)
        value, alignment = run_back_end(cuda, *args, band=band)
    torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(alignment, expected_alignment, rtol=0, atol=1e-8)


def short_of_memory(patch, cost, strips):
    """Leave memory for the weights of that many strips."""
    row = cost[:, 0].numel() * cost.element_size()
    patch.setattr(cuda, "has_room", lambda cost: False)
    patch.setattr(cuda, "free_bytes", lambda device: (32 * strips + 1) * row)


@pytest.mark.parametrize("strips", [0, 1, 2, 3, 100])
def test_little_memory_gives_the_same(align, monkeypatch, strips):
    cost = random_cost(3, 150, 120, dtype=torch.float32)
    args = (cost, torch.tensor([150, 33, 97]), torch.tensor([120, 40, 64]), 0.1, 80)
    value, alignment = align(*args)
    short_of_memory(monkeypatch, cost, strips)
    later_value, later_alignment = align(*args)
    assert torch.equal(later_value, value)
    assert torch.equal(later_alignment, alignment)


def test_one_launch_each_way(emulator):
    cost = random_cost(3, 90, 40)
    for with_alignment, expected in ((False, ["forward"]), (True, ["forward", "backward"])):
        emulator.launches.clear()
        run_back_end(cuda, cost, *full(cost), 0.1, None, with_alignment)
        assert emulator.launches == expected


@pytest.mark.parametrize("with_alignment", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_halves_of_a_border_start_unwritten(emulator, monkeypatch, with_alignment, dtype):
    # Unlike the emulator, a GPU may show two stores in any order: each half must begin as EMPTY.
    unwritten = []

    def launch(name, blocks, args):
        if name == "forward":
            *borders, rows, step = args[-8:-4]
            for border in borders:
                words = border.view(3, rows, 40)[:, step::step].contiguous()
                unwritten.append((words.view(torch.uint8) == 255).all().item())
        emulator(name, blocks, args)

    monkeypatch.setattr(cuda, "_launch", launch)
    cost = random_cost(3, 90, 40, dtype=dtype)
    run_back_end(cuda, cost, *full(cost), 0.1, None, with_alignment)
    assert unwritten == [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_use_checks_the_kernels_once(self_check, dtype):
    cost = random_cost(1, 5, 4, dtype=dtype)
    run_back_end(cuda, cost, *full(cost), 0.1, None)
    assert self_check.launches == ["forward", "backward", "forward", "forward", "backward"]
    self_check.launches.clear()
    run_back_end(cuda, cost, *full(cost), 0.1, None)
    assert self_check.launches == ["forward", "backward"]


@pytest.mark.parametrize("wrong", ["value", "NaN", "gradient", "value without gradient"])
def test_wrong_kernels_are_an_error_that_names_the_device(self_check, monkeypatch, wrong):
    def launch(name, blocks, args):
        if wrong == "gradient" and name == "backward":
            return  # the weights are left as they are
        self_check(name, blocks, args)
        keeps = args[-4] is not None if name == "forward" else True
        if name == "forward" and wrong == ("value" if keeps else "value without gradient"):
            args[-1][2] *= 1.01
        if name == "forward" and wrong == "NaN":
            args[-1][2] = math.nan

    monkeypatch.setattr(cuda, "_launch", launch)
    cost = random_cost(1, 5, 4, dtype=torch.float32)
    for _ in range(2):  # never a wrong loss, also at the second try
        with pytest.raises(InputError) as error:
            run_back_end(cuda, cost, *full(cost), 0.1, None)
        what = "value" if wrong == "NaN" else wrong
        assert f"wrong on cpu (cpu): the {what} of a test batch in float32" in str(error.value)
        assert 'use backend="torch"' in str(error.value) and "\n" not in str(error.value)


def test_gamma_zero_breaks_ties_by_diagonal_then_up_then_left(align):
    check_ties(align, 70)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_costs_do_not_overflow(align, scale, dtype):
    cost = (random_cost(2, 70, 50) * scale).to(dtype)
    check_no_overflow(align, cost, (0.0, 1e-300, 0.01, 1.0, 1e30))


def test_batch_equals_one_by_one_whatever_the_padding_holds(align):
    cost = random_cost(4, 80, 75, dtype=torch.float32)
    check_padding(align, cost, torch.tensor([80, 36, 1, 64]), torch.tensor([39, 75, 75, 32]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("cell", [(0, 0), (2, 44), (69, 69)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_costs_spoil_their_own_utterance_only(align, bad, gamma, cell, dtype):
    cost = random_cost(3, 72, 77, dtype=dtype)
    check_not_finite(align, cost, cell, bad, 70, 70, gamma)


def test_nan_of_any_bits_arrives(align):
    for dtype, word in zip(DTYPES, (torch.int32, torch.int64), strict=True):
        for bits in (-1, torch.iinfo(word).max):
            cost = random_cost(1, 70, 40, dtype=dtype)
            cost.view(word)[0, 3, 2] = bits
            assert align(cost)[0].isnan().all()


def test_lengths_that_do_not_fit_give_nan(align):
    cost = random_cost(6, 70, 50, dtype=torch.float32)
    x_lengths = torch.tensor([70, 0, 71, 70, -3, 70])
    y_lengths = torch.tensor([50, 50, 50, 51, 50, 29])
    value, alignment = align(cost, x_lengths, y_lengths, 0.1, 40, band="fixed")
    assert value.isnan().tolist() == [False, True, True, True, True, True]
    assert alignment.flatten(1).isnan().all(1).tolist() == value.isnan().tolist()
    assert alignment[0].isfinite().all()


def test_long_sums_are_accurate_in_float32(emulator):
    for gamma, scale in itertools.product((0.01, 10.0), (0.05, 4.0)):
        check_accuracy(valley_cost(500, 450, scale), 1e-6, 1e-5, gamma)


def check_accuracy(cost, value_tolerance, alignment_tolerance, gamma):
    value, alignment = run_back_end(cuda, cost, *full(cost), gamma, None)
    expected_value, expected = run_back_end(cpu, cost.cpu().double(), *full(cost), gamma, None)
    torch.testing.assert_close(value.cpu().double(), expected_value, rtol=value_tolerance, atol=0)
    assert (alignment.cpu() - expected).abs().max() < alignment_tolerance
    assert alignment.min() >= 0
    # Every path visits every row and every column.
    assert alignment.sum(1).min() > 0.9999 and alignment.sum(2).min() > 0.9999


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_kernels_compile(dtype, capability):
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="no cuda-bindings")
    try:
        code = cuda.machine_code(capability, dtype)
    except pathfinder.DynamicLibNotFoundError:
        pytest.skip("no NVRTC (nvidia-cuda-nvrtc)")
    assert code[:4] == b"\x7fELF" and b"forward" in code and b"backward" in code


def test_without_cuda_bindings_the_error_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InputError) as error:
        cuda._kernels.__wrapped__((9, 0), torch.float32)
    assert str(error.value).startswith('soft_dtw: backend "cuda" needs cuda-bindings and NVRTC')
    assert "\n" not in str(error.value)


def test_auto_runs_where_the_cost_is(device):
    cost = random_cost(3, 130, 120, dtype=torch.float32)
    lengths = torch.tensor([130, 20, 1]), torch.tensor([20, 7, 120])
    value, gradient = value_and_gradient(cost.to(device), *lengths, 0.1)
    assert value.is_cuda and gradient.is_cuda
    explicit = value_and_gradient(cost.to(device), *lengths, 0.1, backend="cuda")
    assert torch.equal(value, explicit[0]) and torch.equal(gradient, explicit[1])
    expected_value, expected_gradient = value_and_gradient(cost, *lengths, 0.1)
    torch.testing.assert_close(value.cpu(), expected_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    cost = random_cost(2, 80, 90).to(device, dtype)
    value, gradient = value_and_gradient(cost, gamma=0.5)
    expected_value, expected_gradient = value_and_gradient(cost.float(), gamma=0.5)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("gamma", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_4000_frames_in_float32_are_accurate(device, gamma, scale):
    check_accuracy(valley_cost(4000, 3900, scale).to(device), 1e-6, 1e-4, gamma)


@pytest.mark.parametrize("bandwidth", [None, 500])
def test_8192_frames(device, bandwidth):
    cost = torch.rand(2, 8192, 8192, device=device)
    lengths = torch.tensor([8192, 8000]), torch.tensor([8192, 8100])
    value, gradient = value_and_gradient(cost, *lengths, 0.1, bandwidth)
    expected = run_back_end(cpu, cost.cpu(), *lengths, 0.1, bandwidth, False)[0]
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-6, atol=0)
    for rows, total in ((8192, gradient[0].sum(1)), (8000, gradient[1].sum(1)[:8100])):
        assert total.min() > 0.9999 and total.max() < rows
    assert (gradient[1, 8000:] == 0).all() and (gradient[1, :, 8100:] == 0).all()


def test_runs_are_bitwise_repeatable(device):
    cost = torch.rand(16, 700, 650, device=device)
    first = value_and_gradient(cost, gamma=0.05)
    for _ in range(20):
        again = value_and_gradient(cost, gamma=0.05)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_more_strips_than_fit_on_the_gpu(device):
    cost = torch.rand(400, 700, 90, device=device)
    value, alignment = run_back_end(cuda, cost, *full(cost), 0.1, None)
    for b in (0, 399):
        one = run_back_end(cuda, cost[b : b + 1], *full(cost[:1]), 0.1, None)
        assert torch.equal(value[b], one[0][0]) and torch.equal(alignment[b], one[1][0])


def test_memory_is_two_arrays(device):
    cost = torch.rand(4, 1000, 1000, device=device, requires_grad=True)
    value_and_gradient(cost)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    value = soft_dtw(cost, gamma=0.1)
    torch.autograd.grad(value.sum(), cost)
    peak = torch.cuda.max_memory_allocated(device) - before
    assert peak <= 2 * 4 * cost.numel() + 2**16


def test_little_memory_is_enough(device, monkeypatch):
    cost = torch.rand(4, 1024, 1000, device=device, requires_grad=True)
    expected = value_and_gradient(cost, gamma=0.1)
    monkeypatch.setattr("posinv.softdtw.functional.has_room", lambda cost: False)
    short_of_memory(monkeypatch, cost, 4)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    value = soft_dtw(cost, gamma=0.1)
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    peak = torch.cuda.max_memory_allocated(device) - before
    assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])
    assert peak <= 1.25 * 4 * cost.numel()


def test_nothing_waits_for_the_gpu(device):
    x, y = torch.rand(3, 90, 8, device=device), torch.rand(3, 80, 8, device=device)
    x.requires_grad_()
    on_gpu = torch.tensor([90, 50, 1], device=device), torch.tensor([80, 80, 3], device=device)
    on_cpu = on_gpu[0].cpu(), on_gpu[1].cpu()
    loss, regulariser = SoftDTWLoss(bandwidth=85), ContrastiveIDM(1.0, 0)
    soft_alignment(x @ y.mT)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        losses = []
        for lengths in (on_gpu, on_cpu, (None, None)):
            losses.append(loss(x, y, *lengths) + regulariser(x, lengths[0]))
            losses[-1].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(losses[0], losses[1])


def test_in_a_cuda_graph(device):
    x = torch.rand(3, 90, 8, device=device, requires_grad=True)
    y = torch.rand(3, 80, 8, device=device)
    x_lengths = torch.tensor([90, 50, 1], device=device)
    y_lengths = torch.tensor([80, 80, 3], device=device)
    loss = SoftDTWLoss()

    def step():
        value = loss(x, y, x_lengths, y_lengths)
        return value, *torch.autograd.grad(value.sum(), x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        y.uniform_()
    x_lengths.copy_(torch.tensor([30, 90, 64]))  # other lengths at replay
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, captured, step()))


def test_lengths_on_the_gpu_that_do_not_fit_give_nan(device):
    cost = torch.rand(3, 70, 50, device=device)
    lengths = torch.tensor([70, 71, 60], device=device), torch.tensor([50, 50, 5], device=device)
    value = soft_dtw(cost, *lengths, 0.1, 40, band="fixed")
    assert value.isnan().tolist() == [False, True, True]
    idm = ContrastiveIDM(1.0, 0)(cost, lengths[0])
    assert idm.isnan().tolist() == [False, True, False]


def test_runs_on_the_costs_device_and_the_current_stream(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    cost = torch.rand(2, 70, 60)
    expected = value_and_gradient(cost.to("cuda:0"))
    with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        value, gradient = value_and_gradient(cost.to("cuda:1"))
    assert torch.equal(value.cpu(), expected[0].cpu())
    assert torch.equal(gradient.cpu(), expected[1].cpu())
