import re
import subprocess
import sys

import pytest

from posinv.errors import InputError
from posinv.report import results
from posinv.report.results import (
    ABSENT,
    BEGIN,
    END,
    Published,
    aggregate,
    markdown_table,
    provenance,
    write_results,
)


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
        "import sys, posinv.report.results, posinv.scoring.text; "
        "print([m for m in ('espnet', 'espnet2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_published(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text("- {system: base, task: pr, set: test_clean, figure: 4.84, source: s3prl}\n")
    published = Published.read(path)
    assert published.figures == {("base", "pr", "test_clean"): ("4.84", "s3prl")}
    sets = ["test_clean", "test_seen"]
    assert published.beside(sets, "pr", sets) == ["test_clean", "published", "test_seen"]
    assert published.beside(["5.0", "9.0"], "pr", sets, "base") == ["5.0", "4.84", "9.0"]
    assert published.beside(["5.0", "9.0"], "pr", sets, "laser") == ["5.0", "", "9.0"]
    assert published.beside(["5.0", "9.0"], "asr", sets, "base") == ["5.0", "9.0"]
    nothing = Published.read(None)
    assert nothing.beside(sets, "pr", sets) == sets
    assert nothing.sources() == ""


@pytest.mark.parametrize(
    "text",
    [
        "{system: base}",
        "- {system: base, task: pr, set: x, figure: 1}",
        "- {system: base, task: asv, set: x, figure: 1, source: y}",
        "- 4.84",
        "",
    ],
)
def test_bad_published(tmp_path, text):
    path = tmp_path / "published.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"--published .*published\.yaml"):
        Published.read(path)
