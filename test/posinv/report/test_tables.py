import pytest

from posinv.errors import InputError
from posinv.report.enhancement import enhancement_report
from posinv.report.tables import Cell, Column, ScoreReader, Table, figure

WORSE = {f"u{i:02}": 2 for i in range(30)}
BETTER = {f"u{i:02}": 1 for i in range(30)}


def table(*columns):
    rows = [[Cell(f"row {i}"), *row] for i, row in enumerate(zip(*columns, strict=True))]
    kinds = [Column("low", "low"), Column("high", "high"), Column("none")]
    return Table("t", "a caption", [Column("system"), *kinds[: len(columns)]], rows)


def test_best():
    low = [figure([3.0]), figure([2.04]), figure([1.96])]  # the last two are shown as 2.0
    high = [figure([1.0, 2.0]), figure([None, 2.0]), figure([1.0, 1.0])]
    none = [figure([1.0]), figure([2.0]), figure([3.0])]
    assert table(low, high, none).best() == {(1, 1), (2, 1), (0, 2)}


def test_where_all_are_alike_none_is_best():
    assert table([figure([1.0]), figure([1.0])]).best() == set()
    assert table([figure([None]), figure([None])]).best() == set()


def test_markdown():
    text = table([figure([1.0, 3.0], marks="*"), Cell("no")]).markdown()
    assert text == (
        "a caption:\n\n"
        "| system |         low |\n| :----- | ----------: |\n"
        "| row 0  | 2.0 ± 1.4 * |\n| row 1  |          no |\n"
    )


def test_marks_stand_in_the_table_and_are_explained(experiment_of):
    path = experiment_of({"1": {"noisy": WORSE, "enh": WORSE, "ssl_mse": BETTER}})
    labels = {"noisy": "noisy input", "enh": "before fine-tuning", "ssl_mse": "ssl_mse"}
    report = lambda: enhancement_report(path, labels, ["test_clean"], [], ["1"])  # noqa: E731
    assert "| ssl_mse            |     25.0 * |\n" in report()
    assert "| before fine-tuning |       50.0 |\n" in report()
    assert "* from before fine-tuning" in report()
    for file in path.glob("**/scores.tsv"):
        file.unlink()
    assert "| ssl_mse            |       25.0 |\n" in report()
    assert "interval" not in report()


def test_missing_scores(tmp_path):
    path = tmp_path / "scores.json"
    with pytest.raises(InputError, match=r"scores\.json: cannot read"):
        ScoreReader()(path, ["a"], ["rate"])
    read = ScoreReader(strict=False)
    assert read(path, ["a"], ["rate"]) == {"a": {"rate": None}}
    assert [message.partition(": ")[0] for message in read.missing] == [str(path)]
