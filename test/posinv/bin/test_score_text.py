import json
import sys

import pytest

from posinv.bin.cli import run
from posinv.bin.score_text import main


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / "ref").write_text("u1 a b\nu2 c\n")
    (tmp_path / "hyp").write_text("u1 a x\nu2 c\n")
    (tmp_path / "utt2set").write_text("u1 one\nu2 two\n")
    options = [f"--{name}={tmp_path / name}" for name in ("ref", "hyp", "utt2set")]
    out = tmp_path / "a folder" / "scores.json"
    monkeypatch.setattr(
        sys, "argv", ["posinv/bin/score_text.py", *options, "--unit=phone", f"--out={out}"]
    )
    return tmp_path


def test_writes_scores_and_alignments(arguments):
    run(main)
    scores = json.loads((arguments / "a folder" / "scores.json").read_text())
    assert scores["one"] == {
        **{"rate": 50.0, "errors": 1, "sub": 1, "ins": 0, "del": 0, "ref_tokens": 2}
    }
    assert scores["two"]["rate"] == 0
    text = (arguments / "a folder" / "scores.txt").read_text()
    assert "REF: a b\nHYP: a x\n       S" in text
    assert "##### two: phone error rate 0.00 %" in text


def test_an_error_is_one_line_and_writes_nothing(arguments, capsys):
    (arguments / "hyp").write_text("u1 a\n")
    with pytest.raises(SystemExit) as exit_status:
        run(main)
    assert exit_status.value.code == 1
    assert capsys.readouterr().err == (
        f"score_text: error: {arguments / 'hyp'}: no utterance u2, which is in "
        f"{arguments / 'ref'} (1 such): both must list the same utterances\n"
    )
    assert not (arguments / "a folder").exists()
