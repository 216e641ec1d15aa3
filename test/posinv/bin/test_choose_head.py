import json
import sys

import pytest

from posinv.bin.choose_head import main
from posinv.bin.cli import run


@pytest.fixture
def heads(tmp_path, monkeypatch):
    (tmp_path / "ref").write_text("a one two\nb three\n")
    decoded = {"lr_1": "a one\nb three\n", "lr_2": "a one two\nb three\n", "lr_3": "a x y\nb z\n"}
    for name, text in decoded.items():
        (tmp_path / name / "decode_valid").mkdir(parents=True)
        (tmp_path / name / "decode_valid" / "text").write_text(text)
    options = ["--heads", *(str(tmp_path / name) for name in decoded), "--unit", "word"]
    options += ["--ref", str(tmp_path / "ref"), "--out", str(tmp_path / "best")]
    monkeypatch.setattr(sys, "argv", ["choose_head.py", *options])
    return tmp_path


def test_lowest_error_rate_is_linked(heads):
    run(main)
    assert (heads / "best").readlink().name == "lr_2"
    rates = json.loads((heads / "best.json").read_text())
    assert rates == pytest.approx({"lr_1": 100 / 3, "lr_2": 0, "lr_3": 100})


def test_again_with_another_outcome(heads):
    run(main)
    (heads / "lr_3" / "decode_valid" / "text").write_text("a one two\nb three\n")
    (heads / "lr_2" / "decode_valid" / "text").write_text("a one\nb three\n")
    run(main)
    assert (heads / "best").readlink().name == "lr_3"


def test_other_utterances(heads, capsys):
    (heads / "lr_3" / "decode_valid" / "text").write_text("a one two\n")
    with pytest.raises(SystemExit):
        run(main)
    assert "choose_head: error: " in capsys.readouterr().err
    assert not (heads / "best").exists()
