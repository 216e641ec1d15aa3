import numpy as np
import pytest

from posinv.corpora.search import search_in_transcripts
from posinv.data.tables import read_table, write_table
from posinv.errors import InputError
from posinv.scoring.query_search import read_relevance


@pytest.fixture
def folders(tmp_path):
    """Queries and documents, as format_data and the recipes leave them."""
    texts = {
        "queries": {"q1": "red", "q2": "red box", "q3": "blue"},
        "documents": {"d1": "the red box", "d2": "a box of red", "d3": "the redbox"},
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "text", text)
        write_table(tmp_path / name / "wav.scp", {utt: f"{utt}.flac" for utt in text})
        write_table(tmp_path / name / "utt2digest", {utt: f"digest-{utt}" for utt in text})
    sets = {"d1": "test_clean", "d2": "test_seen", "d3": "test_seen"}
    write_table(tmp_path / "documents" / "utt2set", sets)
    return tmp_path


def make(folders):
    return search_in_transcripts(folders / "queries", folders / "documents", folders / "out")


def test_whole_words_in_order_are_relevant(folders):
    assert make(folders) == {"q1": 2, "q2": 1, "q3": 0}
    out = folders / "out"
    queries, documents, sets = (
        read_table(out / name) for name in ("queries.scp", "documents.scp", "utt2set")
    )
    assert queries == {f"q{k}": f"q{k}.flac" for k in (1, 2, 3)}
    assert documents == {f"d{k}": f"d{k}.flac" for k in (1, 2, 3)}
    assert sets["d2"] == "test_seen"
    assert read_table(out / "utt2digest") == {n: f"digest-{n}" for n in (*documents, *queries)}
    assert np.array_equal(
        read_relevance(out / "relevance", [*queries], [*documents]),
        [[True, True, False], [True, False, False], [False, False, False]],
    )


def test_bad_folders(folders):
    write_table(folders / "queries" / "text", {"q1": "green", "q2": "pink", "q3": "black"})
    with pytest.raises(InputError, match="no query's words are in a transcript of"):
        make(folders)
    write_table(folders / "queries" / "text", {"q1": "red"})
    with pytest.raises(InputError, match="no utterance q2"):
        make(folders)
    for name in ("text", "wav.scp"):
        write_table(folders / "queries" / name, {"d1": "red"})
    with pytest.raises(InputError, match="d1 is a document, too"):
        make(folders)
    assert not (folders / "out").exists()
