import csv
import json
import sys

import numpy as np
import pytest
import soundfile

from posinv.bin.cli import run
from posinv.bin.score_enh import main
from posinv.scoring.enhancement import ENHANCEMENT_METRICS, si_sdr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("ref", "inf"):
        lines = []
        for utterance in ("u1", "u2"):
            path = tmp_path / f"{name} {utterance}.wav"
            soundfile.write(path, 0.1 * rng.standard_normal(8000), 16000)
            lines.append(f"{utterance} {path}\n")
        (tmp_path / f"{name}.scp").write_text("".join(lines))
    (tmp_path / "utt2set").write_text("u1 one\nu2 two\n")
    arguments = [
        *(f"--ref_scp={tmp_path / 'ref.scp'}", f"--inf_scp={tmp_path / 'inf.scp'}"),
        *(f"--utt2set={tmp_path / 'utt2set'}", f"--out={tmp_path / 'out' / 'scores.json'}"),
    ]
    monkeypatch.setattr(sys, "argv", ["posinv/bin/score_enh.py", *arguments])
    return tmp_path


def test_writes_means_and_utterances(folder):
    run(main)
    means = json.loads((folder / "out" / "scores.json").read_text())
    assert list(means) == ["one", "two"]
    with (folder / "out" / "scores.tsv").open() as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert list(rows[0]) == ["utterance", "set", *ENHANCEMENT_METRICS]
    for row, utterance in zip(rows, ("u1", "u2"), strict=True):
        assert row["utterance"] == utterance
        ref, inf = (
            soundfile.read(folder / f"{name} {utterance}.wav")[0] for name in ("ref", "inf")
        )
        assert float(row["si_sdr"]) == pytest.approx(si_sdr(inf, ref))
        assert means[row["set"]]["si_sdr"] == float(row["si_sdr"])
        assert means[row["set"]]["utterances"] == 1


def test_only_some_sets(folder, monkeypatch, capsys):
    run(main)
    out = folder / "out" / "scores.json"
    means = json.loads(out.read_text())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--sets", "two"])
    run(main)
    assert json.loads(out.read_text()) == {"two": means["two"]}
    assert [line.split()[0] for line in out.with_suffix(".tsv").open()] == ["utterance", "u2"]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "two three"])
    with pytest.raises(SystemExit):
        run(main)
    assert "error: --sets three: " in capsys.readouterr().err


def test_an_error_is_one_line_and_writes_nothing(folder, capsys):
    (folder / "inf u2.wav").unlink()
    with pytest.raises(SystemExit) as exit_status:
        run(main)
    assert exit_status.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"score_enh: error: {folder / 'inf.scp'}: utterance u2: ")
    assert error.count("\n") == 1
    assert not (folder / "out").exists()
