import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posinv.errors import InputError
from posinv.report import results
from posinv.report.results import (
    ABSENT,
    BEGIN,
    END,
    aggregate,
    enhancement_report,
    markdown_table,
    provenance,
    write_results,
)

SETS = ["test_clean", "test_seen", "test_unseen"]
SE_SETS = ["test_seen", "test_unseen"]
SYSTEMS = {"noisy": "noisy input", "ssl_mse": "ssl_mse"}


def write_experiment(expdir: Path, seeds: list[str], pesq: float | None = 2.0) -> None:
    """Scores that tell seed, system, task and set apart."""
    for s, seed in enumerate(seeds):
        for y, system in enumerate(SYSTEMS):
            base = expdir / f"seed{seed}" / system
            for t, task in enumerate(("pr", "asr")):
                path = base / "superb" / task / "decode" / "scores.json"
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
    """The cells of each table, read back."""
    found = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    lines = [table.splitlines() for table in found]
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [rows[0], *rows[2:]]]
        for rows in lines
    ]


def test_markdown_table():
    table = markdown_table(
        ["system", "a", "longer"], [["x|y", "1.0", "2"], ["ß", "10.0 ± 1.0", ""]]
    )
    assert table == (
        "| system |          a | longer |\n"
        "| :----- | ---------: | -----: |\n"
        "| x\\|y   |        1.0 |      2 |\n"
        "| ß      | 10.0 ± 1.0 |        |\n"
    )


@pytest.mark.parametrize("rows", [[["a"]], [["a", "b", "c"]]])
def test_markdown_table_refuses_ragged_rows(rows):
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["x", "y"], rows)


@pytest.mark.parametrize(
    ("values", "decimals", "cell"),
    [
        ([12.34], 1, "12.3"),
        ([0.8765], 3, "0.876"),
        ([1.0, 2.0], 1, "1.5 ± 0.7"),  # sqrt(1/2)
        ([10.0, 12.0, 17.0], 1, "13.0 ± 3.6"),  # sqrt((9 + 1 + 16) / 2)
        ([5.0, 5.0, 5.0], 2, "5.00 ± 0.00"),
        ([1.0, None], 1, ABSENT),
        ([None], 1, ABSENT),
    ],
)
def test_aggregate(values, decimals, cell):
    assert aggregate(values, decimals) == cell


def test_one_seed(tmp_path):
    write_experiment(tmp_path, ["1"])
    text = report(tmp_path, ["1"])
    per, wer, se = tables(text)
    assert per == [
        ["system", *SETS],
        ["noisy input", "0.0", "5.0", "10.0"],
        ["ssl_mse", "20.0", "25.0", "30.0"],
    ]
    assert wer[1:] == [
        ["noisy input", "50.0", "55.0", "60.0"],
        ["ssl_mse", "70.0", "75.0", "80.0"],
    ]
    assert se == [
        ["system", "SI-SDR (dB)", "STOI", "PESQ"],
        ["noisy input", "0.5", "0.505", "2.25"],
        ["ssl_mse", "10.5", "0.605", "3.25"],
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
    per, _, se = tables(text)
    assert per[2] == ["ssl_mse", "21.0 ± 1.0", "26.0 ± 1.0", "31.0 ± 1.0"]
    assert se[1] == ["noisy input", "1.5 ± 1.0", "0.525 ± 0.020", "2.25 ± 0.00"]
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
        "seed2/ssl_mse/superb/pr/decode/scores.json",
        "seed1/noisy/superb/asr/decode/scores.json",
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


def test_provenance():
    lines = provenance("./run.sh --seeds '1 2'").splitlines()
    assert lines[0] == "- command: `./run.sh --seeds '1 2'`"
    assert re.fullmatch(r"- date: \d{4}-\d\d-\d\d \d\d:\d\d UTC", lines[1])
    assert re.fullmatch(r"- git commit: ([0-9a-f]{40}( with uncommitted changes)?|unk.*)", lines[2])
    assert re.fullmatch(r"- machine: .+, \d+ cores, \d+ GiB memory, .+", lines[3])
    for name in ("Python", "posinv", "torch", "espnet", "transformers", "numpy"):
        assert re.search(rf"{name} [\w.+]+", lines[4])


class TestGitState:
    def git(self, folder, *arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    def test_states(self, tmp_path):
        folder = tmp_path / "posinv"
        folder.mkdir()
        assert results._git_state(folder).startswith("unknown")
        self.git(tmp_path, "init")
        assert results._git_state(folder).startswith("unknown")
        (folder / "x.py").write_text("1\n")
        self.git(tmp_path, "add", ".")
        self.git(tmp_path, "commit", "-m", "x")
        clean = results._git_state(folder)
        assert re.fullmatch(r"[0-9a-f]{40}", clean)
        (tmp_path / "egs").mkdir()
        for recipe in (tmp_path, tmp_path / "egs"):
            (recipe / "RESULTS.md").write_text("being written\n")
        assert results._git_state(folder) == clean
        (tmp_path / "egs" / "run.sh").write_text("beside the package\n")
        assert results._git_state(folder) == f"{clean} with uncommitted changes"


class TestWriteResults:
    def test_new_file(self, tmp_path):
        path = tmp_path / "a b" / "RESULTS.md"
        write_results(path, "A title", "body\n")
        assert path.read_text() == f"# A title\n\n{BEGIN}\n\nbody\n\n{END}\n"

    def test_the_rest_is_kept(self, tmp_path):
        path = tmp_path / "RESULTS.md"
        path.write_text(f"# Mine\n\nWhat we see.\n{BEGIN}\nold\n{END}\n\nAnd more.\n")
        write_results(path, "Another title", "new")
        expected = f"# Mine\n\nWhat we see.\n{BEGIN}\n\nnew\n\n{END}\n\nAnd more.\n"
        assert path.read_text() == expected
        write_results(path, "Another title", "new")
        assert path.read_text() == expected

    @pytest.mark.parametrize(
        "content",
        [
            "by hand\n",
            f"{BEGIN}\n",
            f"{END}\n{BEGIN}\n",
            f"{BEGIN}{END}{BEGIN}{END}",
            f"{BEGIN}{END}{END}",
        ],
    )
    def test_other_files_are_not_overwritten(self, tmp_path, content):
        path = tmp_path / "RESULTS.md"
        path.write_text(content)
        with pytest.raises(InputError, match=r"RESULTS\.md: exists, but hasn't one"):
            write_results(path, "title", "body")
        assert path.read_text() == content


def test_espnet_is_not_imported():
    code = (
        "import sys, posinv.report.results, posinv.scoring; "
        "print([m for m in ('espnet', 'espnet2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
