import csv
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def test_quick_run(tmp_path, python):
    out = tmp_path / "out dir"
    options = ["--quick", "--seconds", "0.5", "--batch", "2", "--turns", "2", "--heads", "1", "2"]
    command = [*python, "-m", "bench_superb", *options, "--out", str(out)]
    done = subprocess.run(command, cwd=TOOLS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"superb_cpu.csv", "superb_cpu.png"}
    lines = (out / "superb_cpu.csv").read_text().splitlines()
    [totals] = [line for line in lines if "one model's evaluation on LibriSpeech" in line]
    for name in ("separate trainings", "S3PRL's practice", "heads_train", "with the cache"):
        assert name in totals
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    heads = [(row["phoneme_heads"], row["word_heads"], row["cache"]) for row in rows]
    mixes = [("5", "3"), ("1", "1"), ("0", "1")]
    assert heads == [
        *(("1", "0", "no"), ("2", "0", "no"), *((*mix, "no") for mix in mixes)),
        *(("1", "0", "yes"), *((*mix, "yes") for mix in mixes)),
    ]
    for row in rows:
        assert float(row["update_s"]) > 0
        # Both are rounded to 1 ms, which is much of a tiny model's update.
        separate, together = float(row["separate_s"]), float(row["update_s"])
        least = (separate - 5e-4) / (together + 5e-4)
        assert least - 0.01 <= float(row["times"]) <= (separate + 5e-4) / (together - 5e-4) + 0.01


@pytest.fixture
def times(monkeypatch):
    """A front end of 10 s, phoneme heads of 1 s, word heads of 4 s."""
    monkeypatch.syspath_prepend(str(TOOLS))
    from bench_superb import Times

    heads = [(1, 0), (8, 0), (5, 3), (1, 1), (0, 1)]
    own = {(pr, asr): float(pr + 4 * asr) for pr, asr in heads}
    return Times({"pr": 11.0, "asr": 14.0}, {h: 10 + s for h, s in own.items()}, own)


def test_what_is_possible(times):
    assert times.separately((5, 3)) == 5 * 11 + 3 * 14
    for heads in times.together:
        assert times.possible(heads) == pytest.approx(
            times.separately(heads) / times.together[heads]
        )


def test_totals(times):
    totals = times.totals()
    assert totals["separate trainings"] == 5 * 100_000 * 11 + 3 * 200_000 * 14
    assert totals["S3PRL's practice"] == pytest.approx(1.1 * 100_000 * 11 + 1.15 * 200_000 * 14)
    ours = 10_000 * 27 + 90_000 * 15 + 100_000 * 14
    assert totals["heads_train"] == ours
    # The audio goes through the front end once.
    assert totals["heads_train with the cache"] == pytest.approx(
        ours - 200_000 * 10 + 28_539 / 32 * 10
    )
