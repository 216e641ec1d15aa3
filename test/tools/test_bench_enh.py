import csv

import pytest


def test_quick_run_times_every_phase_of_both(quick_bench, tmp_path):
    done = quick_bench(
        "bench_enh", "--seconds", 0.5, "--utterances", 2, "--out", tmp_path / "out dir"
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out dir").iterdir()} == {
        "enh_hubert_cpu.csv",
        "enh_hubert_cpu.png",
    }
    lines = (tmp_path / "out dir" / "enh_hubert_cpu.csv").read_text().splitlines()
    # What is kept of an hour: 50 frames a second of the tiny model's 32 float32 numbers.
    kept = [line for line in lines if "kept from epoch to epoch" in line]
    assert len(kept) == 1 and "take 0.02 GB an hour" in kept[0]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    criteria = ("ssl_mse", "ssl_mse_pad", "ssl_softdtw")
    assert [(row["criterion"], row["implementation"]) for row in rows] == [
        (criterion, way) for criterion in criteria for way in ("posinv", "one by one")
    ]
    for row in rows:
        assert (row["utterances"], row["updates"]) == ("2", "2")
        phases = [float(value) for key, value in row.items() if key.endswith("_ms")]
        assert all(phase > 0 for phase in phases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", "0"], "--updates must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be at least 0.1, got 0"),
    ],
)
def test_bad_options_are_one_line(quick_bench, tmp_path, options, message):
    done = quick_bench("bench_enh", "--out", tmp_path, *options)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
