import csv
import io
import json
import re
import shutil
import subprocess

import pytest

from posinv.errors import InputError
from posinv.report.experiment import Experiment
from posinv.report.results import Published
from posinv.report.summary import (
    FORMATS,
    _short_names,
    summarise,
    summarise_all,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
)

WORSE = {f"u{i:02}": 2 for i in range(30)}
BETTER = {f"u{i:02}": 1 for i in range(30)}


@pytest.fixture
def path(experiment_of):
    systems = {"noisy": WORSE, "enh": WORSE, "ssl_mse": BETTER}
    return experiment_of({"1": systems, "2": systems | {"ssl_mse": WORSE}}, ["test_a&b"])


def test_markdown(path):
    text = to_markdown(summarise(Experiment.read(path)))
    assert re.search(r"\| ssl_mse +\| +37.5 ± 17.7 \|\n", text)
    assert re.search(r"\| before fine-tuning \| +noisy input \| +PER \|", text)
    assert "-25.00 to +0.00" in text


def test_json_has_every_seed(path):
    content = json.loads(to_json(summarise(Experiment.read(path))))
    row = content["tables"][0]["rows"][2]
    assert row["system"] == "ssl_mse"
    assert row["test_a&b"] == {"mean": 37.5, "sd": pytest.approx(17.678, 1e-4), "seeds": [25, 50]}
    [one] = [d for d in content["differences"] if d["system"] == "ssl_mse" and d["task"] == "pr"]
    assert (one["value"], one["low"], one["high"], one["units"]) == (-12.5, -25, 0, 30)
    assert one["significant"] is False


def test_csv(path):
    rows = list(csv.DictReader(io.StringIO(to_csv(summarise(Experiment.read(path))))))
    figures = [row for row in rows if row["kind"] == "figure"]
    assert [row["value"] for row in figures] == ["50.0", "50.0", "37.5"] * 2
    assert [row["seeds"] for row in rows] == ["2"] * len(rows)
    assert {row["against"] for row in rows} == {"", "noisy input", "before fine-tuning"}


def test_latex_is_escaped(path):
    text = to_latex(summarise(Experiment.read(path)))
    assert r"system & test\_a\&b \\" in text
    assert r"ssl\_mse & \textbf{37.5 $\pm$ 17.7} \\" in text


def test_several_experiments(path, tmp_path):
    other = tmp_path / "other" / "exp"
    shutil.copytree(path, other)
    shutil.rmtree(other / "seed1" / "enh")
    shutil.rmtree(other / "seed2" / "enh")
    summary = summarise_all([Experiment.read(path), Experiment.read(other)])
    labels = [row[0].text for row in summary.tables[0].rows]
    assert len(labels) == 5
    name = labels[-1].partition(": ")[0]
    assert labels[-2:] == [f"{name}: noisy input", f"{name}: ssl_mse"]
    across = [one for one in summary.found if one.reference.endswith(": ssl_mse")]
    assert [one.value for one in across] == [0, 0]  # PER and WER, the same in both


def test_short_names(tmp_path):
    paths = [tmp_path / "a/enh1/exp", tmp_path / "b/enh1/exp", tmp_path / "b/c/enh1/exp"]
    assert _short_names(paths) == ["a", "b", "b/c"]
    assert _short_names(paths[:1] * 2) == [str(paths[0])] * 2


def test_experiment_without_scores(tmp_path):
    summary = summarise(Experiment.read(tmp_path))
    assert (summary.tables, summary.found) == ([], [])
    training = tmp_path / "seed1" / "laser"
    training.mkdir(parents=True)
    (training / "config.yaml").write_text("max_epoch: 1\n")
    (tmp_path / "seed1" / "base").mkdir()
    summary = summarise(Experiment.read(tmp_path))
    assert any("collapse.json" in message for message in summary.missing)
    for write in FORMATS.values():
        assert "NaN" not in write(summary)
    with pytest.raises(InputError, match="no such folder"):
        Experiment.read(tmp_path / "nothing")


def test_measures_of_enhanced_speech(enh_experiment):
    """Their differences are in each format, with their own names and digits."""
    summary = summarise(Experiment.read(enh_experiment, ["enh", "ssl_mse"]))
    [one] = [one for one in summary.found if one.task == "si_sdr"]
    assert (one.system, one.value, one.test_set) == ("ssl_mse", pytest.approx(1), "test_seen")
    row = r"\| ssl_mse +\| before fine-tuning \| SI-SDR \(dB\) \| +test_seen \| +\+1.00 \|"
    assert re.search(row, to_markdown(summary))
    csv_rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    [row] = [row for row in csv_rows if row["measure"] == "SI-SDR (dB)"]
    assert float(row["value"]) == pytest.approx(1)
    found = [one for one in json.loads(to_json(summary))["differences"] if one["task"] == "si_sdr"]
    assert [(one["value"], one["significant"]) for one in found] == [(pytest.approx(1), True)]
    assert r"\textbf{4.2 $\pm$ 0.0}$^{*}$" in to_latex(summary)


def test_measures_of_several_experiments(enh_experiment, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(enh_experiment, other)
    summary = summarise_all([Experiment.read(enh_experiment), Experiment.read(other)])
    across = [one for one in summary.found if one.system.partition(": ")[2] == "ssl_mse"]
    values = {one.reference.partition(": ")[2]: one.value for one in across if one.task == "si_sdr"}
    assert values == {"before fine-tuning": pytest.approx(1), "ssl_mse": 0}


def test_published(path):
    published = Published({("ssl_mse", "pr", "test_a&b"): ("5.9", "a table")})
    table = summarise(Experiment.read(path), published).tables[0]
    assert [column.name for column in table.columns] == ["system", "test_a&b", "published"]


def test_command(path, tmp_path, python):
    out = tmp_path / "results.json"
    command = [*python, "-m", "posinv.bin.results", path, "--format", "json", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["tables"]
