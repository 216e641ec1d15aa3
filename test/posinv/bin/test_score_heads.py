import json
import sys

import pytest

from posinv.bin.cli import run
from posinv.bin.score_heads import main

VALID = {"lr_1": "a one\nb three\n", "lr_2": "a one two\nb three\n", "lr_3": "a x y\nb z\n"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three heads of ASR and one of PR; lr_2 is right on the validation set."""
    for name, text in {"valid/text": "a one two\nb three\n", "valid/phn": "a W\nb TH\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/text").write_text("u1 a b\nu2 c\n")
    (tmp_path / "test/phn").write_text("u1 A B\nu2 K\n")
    (tmp_path / "test/utt2set").write_text("u1 one\nu2 two\n")
    heads = {f"asr/{name}": (text, "u1 a x\nu2 c\n") for name, text in VALID.items()}
    heads["pr/lr_config"] = ("a W\nb TH\n", "u1 A B\nu2\n")
    for name, (valid, test) in heads.items():
        for part, text in {"decode_valid": valid, "decode": test}.items():
            (tmp_path / name / part).mkdir(parents=True)
            (tmp_path / name / part / "text").write_text(text)
    options = ["--dir", tmp_path, "--valid", tmp_path / "valid", "--test", tmp_path / "test"]
    options += ["--task", "asr", "word", "text", *VALID, "--task", "pr", "phone", "phn"]
    monkeypatch.setattr(sys, "argv", ["score_heads.py", *map(str, options), "lr_config"])
    return tmp_path


def test_lowest_error_rate_is_linked_and_scored(folder):
    run(main)
    assert (folder / "asr/best").readlink().name == "lr_2"
    rates = json.loads((folder / "asr/best.json").read_text())
    assert rates == pytest.approx({"lr_1": 100 / 3, "lr_2": 0, "lr_3": 100})
    scores = json.loads((folder / "asr/best/decode/scores.json").read_text())
    assert scores["one"] == {
        **{"rate": 50.0, "errors": 1, "sub": 1, "ins": 0, "del": 0, "ref_tokens": 2}
    }
    assert scores["two"]["rate"] == 0
    text = (folder / "asr/best/decode/scores.txt").read_text()
    assert "REF: a b\nHYP: a x\n       S" in text
    assert "##### two: word error rate 0.00 %" in text
    header, *rows = (folder / "asr/best/decode/scores.tsv").read_text().splitlines()
    assert header.split("\t") == ["utterance", "set", "errors", "ref_tokens", "ref", "hyp"]
    assert rows == ["u1\tone\t1\t2\ta b\ta x", "u2\ttwo\t0\t1\tc\tc"]
    phones = json.loads((folder / "pr/best/decode/scores.json").read_text())
    assert (phones["one"]["rate"], phones["two"]["rate"]) == (0, 100)


def test_again_with_another_outcome(folder):
    run(main)
    (folder / "asr/lr_3/decode_valid/text").write_text("a one two\nb three\n")
    (folder / "asr/lr_2/decode_valid/text").write_text("a one\nb three\n")
    run(main)
    assert (folder / "asr/best").readlink().name == "lr_3"
    assert (folder / "asr/lr_3/decode/scores.json").exists()


@pytest.mark.parametrize("name", ["asr/lr_3/decode_valid", "asr/lr_2/decode"])
def test_other_utterances(folder, capsys, name):
    (folder / name / "text").write_text("a one two\n")
    with pytest.raises(SystemExit) as exit_status:
        run(main)
    assert exit_status.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"score_heads: error: {folder / name}/text: no utterance ")
    assert not (folder / "asr/best").exists()


@pytest.mark.parametrize(
    ("words", "message"), [(["pr", "letter", "phn", "x"], "word, phone, char"), (["pr"], "needs a")]
)
def test_bad_task(folder, capsys, monkeypatch, words, message):
    options = ["--dir", "x", "--valid", "x", "--test", "x", "--task", *words]
    monkeypatch.setattr(sys, "argv", ["score_heads.py", *options])
    with pytest.raises(SystemExit):
        run(main)
    assert message in capsys.readouterr().err
