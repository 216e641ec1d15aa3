import pytest

from posinv.data.tables import read_tsv, write_tsv
from posinv.errors import InputError


def test_cells_by_column(tmp_path):
    path = tmp_path / "scores.tsv"
    write_tsv(path, ("utt", "per"), [{"utt": "a b", "per": 0.5}, {"utt": "c", "per": ""}])
    assert read_tsv(path, ("per",)) == [{"utt": "a b", "per": "0.5"}, {"utt": "c", "per": ""}]
    with pytest.raises(InputError, match=r"scores.tsv: no column wer: score again"):
        read_tsv(path, ("utt", "wer"))
    with pytest.raises(InputError, match=r"gone.tsv: no such file: score again"):
        read_tsv(tmp_path / "gone.tsv", ())


@pytest.mark.parametrize("line", ["c", "c\t1\t2", ""])
def test_a_line_that_has_not_as_many_cells_is_refused(tmp_path, line):
    path = tmp_path / "scores.tsv"
    path.write_text(f"utt\tper\na\t1\n{line}\n")
    with pytest.raises(InputError, match=r"scores.tsv: line 3: not 2 cells: score again"):
        read_tsv(path, ("utt",))
