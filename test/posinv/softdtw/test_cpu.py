import os
import subprocess
import sys

import pytest
import torch
from softdtw_helpers import random_cost, value_and_gradient

from posinv.softdtw import cpu, soft_alignment, soft_dtw


@pytest.mark.parametrize("gamma", [1e-40, 0.01, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e5, 1e7, 1e9])
def test_any_ratio_of_float32_costs_to_gamma(gamma, scale):
    # Many ties, and both sides of the limit beyond which float32 costs are computed in float64.
    cost = (4 * random_cost(2, 30, 23) - 1).round()
    lengths = torch.tensor([30, 16]), torch.tensor([20, 23])
    value, alignment = value_and_gradient((scale * cost).float(), *lengths, gamma)
    expected_value = soft_dtw(scale * cost, *lengths, gamma, backend="reference")
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-6, atol=1e-6)
    # At a gamma of 1e-4 only the best paths have weight, as at any smaller gamma. At those, the
    # reference would lose digits.
    _, expected_alignment = value_and_gradient(
        cost, *lengths, max(gamma / scale, 1e-4), backend="reference"
    )
    torch.testing.assert_close(alignment.double(), expected_alignment, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [None, 180])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 10.0])
def test_diagonals_of_several_blocks(dtype, bandwidth, gamma):
    cost = random_cost(1, 600, 690).to(dtype)
    value, alignment = value_and_gradient(cost, None, None, gamma, bandwidth)
    args = (None, None, gamma, bandwidth)
    expected_value, expected_alignment = value_and_gradient(cost.double(), *args, backend="torch")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance / 10, atol=0)
    torch.testing.assert_close(alignment.double(), expected_alignment, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("n", "m", "bandwidth"), [(1, 1, None), (1, 7, None), (7, 1, 0), (6, 6, 0)]
)
def test_a_single_path_keeps_its_digits_at_a_large_gamma(n, m, bandwidth):
    cost = (1e-6 * random_cost(1, n, m)).float()
    path = torch.eye(n) if n == m else torch.ones(n, m)
    value = soft_dtw(cost, gamma=10.0, bandwidth=bandwidth)
    torch.testing.assert_close(value[0], (cost[0] * path).sum(), rtol=1e-6, atol=0)
    assert torch.equal(soft_alignment(cost, gamma=10.0, bandwidth=bandwidth)[0], path)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
@pytest.mark.parametrize("bandwidth", [None, 120])
def test_results_do_not_depend_on_threads_or_on_the_rest_of_the_batch(
    monkeypatch, gamma, bandwidth
):
    monkeypatch.setattr(cpu, "_CELLS_A_HALF", 1000)
    cost = random_cost(5, 700, 650).float()
    cost[3] = torch.nan
    cost[4] *= 1e9
    lengths = torch.tensor([700, 2, 699, 600, 700]), torch.tensor([650, 2, 600, 650, 649])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 10, 16):  # from 10 on, two threads an alignment
            torch.set_num_threads(threads)
            results.append(value_and_gradient(cost, *lengths, gamma, bandwidth))
            alone = soft_dtw(cost, *lengths, gamma, bandwidth)
            torch.testing.assert_close(alone, results[-1][0], rtol=0, atol=0, equal_nan=True)
        torch.set_num_threads(1)
        for b in range(5):
            own = lengths[0][b : b + 1], lengths[1][b : b + 1]
            one = value_and_gradient(cost[b : b + 1], *own, gamma, bandwidth)
            for result in results:
                for found, expected in zip(result, one, strict=True):
                    torch.testing.assert_close(
                        found[b], expected[0], rtol=0, atol=0, equal_nan=True
                    )
    finally:
        torch.set_num_threads(before)


def test_a_second_process_does_not_compile():
    code = (
        "import torch\n"
        "from posinv.softdtw import soft_alignment, soft_dtw\n"
        "for cost in (torch.ones(2, 3, 4), torch.ones(2, 3, 4).double()):\n"
        "    soft_dtw(cost), soft_alignment(cost), soft_alignment(cost, gamma=0, bandwidth=2)\n"
    )

    def messages():
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "NUMBA_DEBUG_CACHE": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        return done.stdout

    messages()
    again = messages()
    assert "data loaded" in again and "saved" not in again


def test_without_a_folder_for_compiled_code_it_works_and_says_so(tmp_path):
    code = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import torch
from posinv.softdtw import cpu, soft_dtw
cpu._SILENT_SECONDS = 0.01
print(soft_dtw(torch.ones(1, 1, 1)).item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.0\n"
    assert done.stderr.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1
    assert done.stderr.count("compiling soft-DTW for this processor") == 1


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_are_those_of_torch():
    # Threads after an operation of torch, after soft-DTW, and after torch again: all the same.
    code = """
import os, torch
from posinv.softdtw import soft_dtw, threads

def ids():
    return set(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
cost = torch.rand(4, 300, 300, requires_grad=True)
soft_dtw(cost[:1, :5, :5]).sum().backward()  # loads what is compiled
(cost * 2).sum()
before = ids()
more = set()
parallel = threads._openmp()
for _ in range(3):
    soft_dtw(cost, gamma=0.1).sum().backward()
    more |= ids() - before
    (cost * 2).sum()
    more |= ids() - before
print(parallel is not None, len(before) >= 3, more)
"""
    known, parallel, more = run_python(code).split(maxsplit=2)
    if known == "False":
        pytest.skip("torch's OpenMP runtime is none that soft-DTW knows")
    assert parallel == "True" and more.strip() == "set()"


@pytest.mark.parametrize("case", ["forked", "another runtime"])
def test_without_torchs_threads_the_result_is_the_same(case):
    code = f"""
import os, torch
from posinv.softdtw import soft_dtw, threads

torch.set_num_threads(2)
cost = torch.rand(4, 300, 300, generator=torch.Generator().manual_seed(0), requires_grad=True)

def digest():
    value = soft_dtw(cost, gamma=0.1)
    (gradient,) = torch.autograd.grad((value * torch.arange(4.0)).sum(), cost)
    # By numpy: a parallel operation of torch would wait for ever in a forked process.
    return value.tolist(), gradient.numpy().tobytes()

expected = digest()
if {case!r} == "forked":
    child = os.fork()
    if not child:
        os._exit(digest() != expected)
    assert os.waitpid(child, 0)[1] == 0
else:
    threads._openmp = lambda: None
    assert digest() == expected
"""
    run_python(code)
