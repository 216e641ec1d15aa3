import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posinv.errors import InputError

SCRIPT = Path(__file__).parents[2] / "tools" / "bench_softdtw.py"


def run_script(*options, stubs=None):
    paths = [str(SCRIPT.parents[1]), *sys.path]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(stubs), *paths] if stubs else paths),
        },
    )


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("bench_softdtw", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_quick_run_writes_every_case_and_names_what_is_absent(tmp_path):
    stub = tmp_path / "stubs" / "tslearn"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('no tslearn here')\n")
    out = tmp_path / "out dir"
    done = run_script("--quick", "--threads", 1, "--out", out, stubs=stub.parent)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"softdtw_cpu.csv", "softdtw_cpu.png"}
    assert (out / "softdtw_cpu.png").read_bytes().startswith(b"\x89PNG")
    lines = (out / "softdtw_cpu.csv").read_text().splitlines()
    assert lines[0].startswith("# - command: `python ") and "--quick" in lines[0]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    ours = [row for row in rows if row["implementation"] == "posinv"]
    cases = ["loop", "cost", "features", "batch", "batch", "frames", "frames"]
    assert [row["case"] for row in ours] == cases
    assert all(float(row["median_ms"]) > 0 and row["times_posinv"] == "1.00" for row in ours)
    assert all(float(row["gradient_error"]) < 1e-4 for row in ours)
    naive = [row for row in rows if row["implementation"] == "naive"]
    assert [row["case"] for row in naive] == ["features"]
    assert float(naive[0]["value_error"]) < 1e-4 and float(naive[0]["gradient_error"]) < 1e-4
    floor = [row for row in rows if row["implementation"] == "floor"]
    assert [row["case"] for row in floor] == ["features"] and float(floor[0]["median_ms"]) > 0
    absent = [row for row in rows if row["implementation"] == "tslearn"]
    assert absent and all("not installed" in row["note"] and not row["runs"] for row in absent)
    table = done.stdout.splitlines()[-len(rows) :]
    assert all(line.startswith("| ") for line in table)
    assert table[-1].split("|")[2].strip() == rows[-1]["implementation"]


def test_wrong_results_of_posinv_are_an_error(bench, monkeypatch):
    plan = bench.QUICK

    def off(cost, gamma, backend="auto"):
        return bench_soft_dtw(cost, gamma=gamma, backend=backend) * (
            1.001 if backend == "auto" else 1.0
        )

    bench_soft_dtw = bench.soft_dtw
    monkeypatch.setattr(bench, "soft_dtw", off)
    with pytest.raises(
        InputError, match=r"posinv.s cost of .* is wrong: relative errors of 1\.0e-03"
    ):
        bench.Bench("cpu", 1, 0.1, plan).measure("cost", plan.main)


def test_a_peer_that_fails_or_takes_too_long_is_a_row_that_says_so(bench, monkeypatch):
    def fails(inputs, gamma):
        raise RuntimeError("out of luck\nand more")

    ours = bench.implementations("cpu")[0]
    peers = [bench.Implementation("bad", "1", fails), bench.Implementation("slow", "2", ours.cost)]
    monkeypatch.setattr(bench, "implementations", lambda device: [ours, *peers])
    rows = bench.Bench("cpu", 1, 0.1, bench.QUICK).measure(
        "batch", bench.QUICK.main, expected := {"slow": 1.0}
    )
    assert [row.name for row in rows] == ["posinv", "bad", "slow"]
    assert rows[1].note == "failed: RuntimeError: out of luck"
    assert rows[2].note == "left out: over 0.1 s expected"
    assert expected["posinv"] == rows[0].median / rows[0].size.cells
    assert bench.record(rows[1], rows)[6:14] == [""] * 8


def test_in_a_loop_the_cost_is_new_and_nothing_rests(bench, monkeypatch):
    rests, seen = [], []
    monkeypatch.setattr(bench.time, "sleep", rests.append)
    timed = bench.Bench.timed

    def watched(self, implementation, loss, inputs):
        seen.append(inputs[0])
        return timed(self, implementation, loss, inputs)

    monkeypatch.setattr(bench.Bench, "timed", watched)
    plan = bench.QUICK
    ours = bench.Bench("cpu", 1, 0.1, plan).measure("loop", plan.main)[0]
    assert ours.name == "posinv" and len(ours.seconds) == plan.repeats
    assert not rests
    measured = [x for x in seen if x.shape[1:] == (plan.main.N, plan.main.M)]
    assert len({x.data_ptr() for x in measured}) > 1  # all are alive
    assert all(torch.equal(x, measured[0]) for x in measured)
    bench.Bench("cpu", 1, 0.1, plan).measure("cost", plan.main)
    assert rests and set(rests) == {bench.REST}


def test_growth_is_the_slope_of_the_logarithms(bench):
    sizes = [bench.Size(2, n, n) for n in (10, 20, 40, 80)]
    rows = [bench.Row("frames", "a", "1", s, (1e-9 * s.cells**1.5,)) for s in sizes]
    frames, medians, exponent = bench.growth(rows, "frames")["a"]
    assert frames == [10, 20, 40, 80] and medians == [row.median for row in rows]
    assert exponent == pytest.approx(1.5)
    assert math.isnan(bench.growth(rows[:1], "frames")["a"][2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gamma", "0"], "--gamma must be above 0, got 0"),
        (["--threads", "0"], "--threads must be in 1.."),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, message):
    done = run_script("--quick", "--out", tmp_path, *options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
