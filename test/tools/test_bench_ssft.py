import csv

import pytest
import torch


@pytest.mark.parametrize("model", ["hubert", "wavlm"])
def test_quick_run_times_every_phase_of_both(quick_bench, tmp_path, model):
    done = quick_bench(
        "bench_ssft",
        "--seconds",
        0.5,
        "--pairs",
        2,
        "--model",
        model,
        "--out",
        tmp_path / "out dir",
    )
    assert done.returncode == 0, done.stderr
    name = f"ssft_{model}_cpu"
    assert {path.name for path in (tmp_path / "out dir").iterdir()} == {
        f"{name}.csv",
        f"{name}.png",
    }
    lines = (tmp_path / "out dir" / f"{name}.csv").read_text().splitlines()
    assert any("the two losses of the same views differ by" in line for line in lines)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["implementation"] for row in rows] == ["posinv", "authors"]
    for row in rows:
        assert (row["pairs"], row["updates"]) == ("2", "3")
        phases = [float(value) for key, value in row.items() if key.endswith("_ms")]
        assert all(phase > 0 for phase in phases)
    assert rows[0]["times_posinv"] == "1.00" and float(rows[1]["times_posinv"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flac", "nowhere"], "--flac nowhere: no .flac file there"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_bad_options_are_one_line(quick_bench, tmp_path, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = quick_bench("bench_ssft", "--out", tmp_path, *options)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
