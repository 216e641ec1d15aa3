import json
import re
from pathlib import Path

import pytest

from posinv.errors import InputError
from posinv.report.enhancement import enhancement_report
from posinv.report.results import ABSENT, Published

SETS = ["test_clean", "test_seen", "test_unseen"]
SE_SETS = ["test_seen", "test_unseen"]
SYSTEMS = {"noisy": "noisy input", "ssl_mse": "ssl_mse"}


def write_experiment(expdir: Path, seeds: list[str], pesq: float | None = 2.0) -> None:
    """Scores that differ for every seed, system, task and set."""
    for s, seed in enumerate(seeds):
        for y, system in enumerate(SYSTEMS):
            base = expdir / f"seed{seed}" / system
            for t, task in enumerate(("pr", "asr")):
                path = base / "superb" / task / "best" / "decode" / "scores.json"
                path.parent.mkdir(parents=True)
                rates = {name: {"rate": 50 * t + 20 * y + 5 * k + s} for k, name in enumerate(SETS)}
                path.write_text(json.dumps(rates))
            path = base / "enhanced" / "scores.json"
            path.parent.mkdir(parents=True)
            scores = {
                name: {
                    "si_sdr": 10 * y + k + s,
                    "stoi": 0.5 + 0.1 * y + 0.01 * k + 0.02 * s,
                    "pesq": pesq if pesq is None else pesq + y + 0.5 * k,
                    "dnsmos": None,
                    "dnsmos_failed": None,
                    "si_sdr_failed": 0,
                    "stoi_failed": 0,
                    "pesq_failed": None if pesq is None else 0,
                    "utterances": 40,
                }
                for k, name in enumerate(SE_SETS)
            }
            path.write_text(json.dumps(scores))


def report(expdir: Path, seeds: list[str]) -> str:
    return enhancement_report(expdir, SYSTEMS, SETS, SE_SETS, seeds)


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the cells of each table."""
    found = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    lines = [table.splitlines() for table in found]
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [rows[0], *rows[2:]]]
        for rows in lines
    ]


def test_published_figures_stand_beside_ours(tmp_path):
    write_experiment(tmp_path, ["1"])
    published = Published({("ssl_mse", "asr", "test_seen"): ("5.9 %", "a table")})
    text = enhancement_report(tmp_path, SYSTEMS, SETS, SE_SETS, ["1"], published)
    plain = tables(report(tmp_path, ["1"]))
    per, wer, signal = tables(text)
    assert (per, signal) == (plain[0], plain[2])
    columns = [[*row[:3], *row[4:]] for row in wer]
    assert columns == plain[1]
    assert [row[3] for row in wer] == ["published", "", "5.9 %"]
    assert "\nPublished: ssl_mse, WER test_seen: 5.9 % (a table).\n" in text


def test_query_by_example_has_a_table_of_its_own(tmp_path):
    write_experiment(tmp_path, ["1"])
    for y, system in enumerate(SYSTEMS):
        path = tmp_path / "seed1" / system / "qbe" / "scores.json"
        path.parent.mkdir()
        path.write_text(json.dumps({name: {"mtwv": 0.1 * k + y} for k, name in enumerate(SETS)}))
    text = enhancement_report(tmp_path, SYSTEMS, SETS, SE_SETS, ["1"], qbe_sets=SETS[:2])
    per, wer, search, signal = tables(text)
    assert [per, wer, signal] == tables(report(tmp_path, ["1"]))
    assert search == [
        ["system", *SETS[:2]],
        ["noisy input", "0.0", "10.0"],
        ["ssl_mse", "100.0", "110.0"],
    ]
    (tmp_path / "seed1" / "ssl_mse" / "qbe" / "scores.json").unlink()
    with pytest.raises(InputError, match=r"qbe/scores\.json"):
        enhancement_report(tmp_path, SYSTEMS, SETS, SE_SETS, ["1"], qbe_sets=SETS[:2])


def test_one_seed(tmp_path):
    write_experiment(tmp_path, ["1"])
    text = report(tmp_path, ["1"])
    per, wer, signal = tables(text)
    assert per == [
        ["system", *SETS],
        ["noisy input", "0.0", "5.0", "10.0"],
        ["ssl_mse", "20.0", "25.0", "30.0"],
    ]
    assert wer[1:] == [
        ["noisy input", "50.0", "55.0", "60.0"],
        ["ssl_mse", "70.0", "75.0", "80.0"],
    ]
    assert signal == [
        ["system", "SI-SDR (dB)", "STOI", "PESQ", "DNSMOS"],
        ["noisy input", "0.5", "0.505", "2.25", ABSENT],
        ["ssl_mse", "10.5", "0.605", "3.25", ABSENT],
    ]
    captions = [line for line in text.splitlines() if line.endswith(":")]
    assert captions == [
        "Phoneme error rate (PER, %), seed 1:",
        "Word error rate (WER, %), seed 1:",
        "Enhancement, mean of test_seen and test_unseen, seed 1:",
    ]
    assert max(map(len, text.splitlines())) <= 100


def test_several_seeds(tmp_path):
    write_experiment(tmp_path, ["1", "2", "7"])
    text = report(tmp_path, ["1", "2", "7"])
    per, _, signal = tables(text)
    assert per[2] == ["ssl_mse", "21.0 ± 1.0", "26.0 ± 1.0", "31.0 ± 1.0"]
    assert signal[1] == [*("noisy input", "1.5 ± 1.0", "0.525 ± 0.020", "2.25 ± 0.00", ABSENT)]
    assert "mean ± sample standard deviation over seeds 1, 2, 7:" in text


def test_no_pesq(tmp_path):
    write_experiment(tmp_path, ["1"], pesq=None)
    text = report(tmp_path, ["1"])
    assert [row[3] for row in tables(text)[2]] == ["PESQ", ABSENT, ABSENT]
    assert "left out" not in text


def test_utterances_without_a_score_are_told(tmp_path):
    write_experiment(tmp_path, ["1", "2"])
    path = tmp_path / "seed2" / "noisy" / "enhanced" / "scores.json"
    scores = json.loads(path.read_text())
    scores["test_seen"]["pesq_failed"] = 3
    path.write_text(json.dumps(scores))
    assert "score is undefined: PESQ of noisy input: 3 of 160." in report(tmp_path, ["1", "2"])


@pytest.mark.parametrize(
    "path",
    [
        "seed2/ssl_mse/superb/pr/best/decode/scores.json",
        "seed1/noisy/superb/asr/best/decode/scores.json",
        "seed2/noisy/enhanced/scores.json",
    ],
)
def test_missing_scores(tmp_path, path):
    write_experiment(tmp_path, ["1", "2"])
    whole = (tmp_path / path).read_text()
    (tmp_path / path).unlink()
    named = re.escape(str(tmp_path / path))
    with pytest.raises(InputError, match=f"^{named}: cannot read the scores: No such file"):
        report(tmp_path, ["1", "2"])

    scores = json.loads(whole)
    del scores["test_unseen"]
    (tmp_path / path).write_text(json.dumps(scores))
    with pytest.raises(InputError, match=f"^{named}: no scores of the set test_unseen"):
        report(tmp_path, ["1", "2"])

    scores["test_unseen"] = {}
    (tmp_path / path).write_text(json.dumps(scores))
    with pytest.raises(InputError, match=f"^{named}: no (rate|si_sdr) of the set test_unseen"):
        report(tmp_path, ["1", "2"])

    (tmp_path / path).write_text(whole[:-3])
    with pytest.raises(InputError, match=f"^{named}: not JSON"):
        report(tmp_path, ["1", "2"])
