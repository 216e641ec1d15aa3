import numpy as np
import pytest

from posinv.corpora.quesst14 import prepare
from posinv.data.audio import read_audio, write_audio
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.scoring.query_search import read_relevance, read_unsearched

LEXEME = "LEXEME {document} 1 0.00 1.00 {query} lex <NA> <NA>\n"


@pytest.fixture
def database(tmp_path):
    """A small database with the layout of quesst14Database."""
    top = tmp_path / "quesst14Database"
    truth = top / "scoring" / "groundtruth_quesst14_eval"
    truth.mkdir(parents=True)
    recordings = {
        "Audio": {"quesst14_00001": "nnenglish", "quesst14_00002": "czech"},
        "eval_queries": {"quesst14_eval_0001": "nnenglish", "quesst14_eval_0002": "slovak"},
    }
    recordings["Audio"]["quesst14_00003"] = "nnenglish"
    for folder, languages in recordings.items():
        (top / folder).mkdir()
        lines = []
        for number, (name, language) in enumerate(languages.items()):
            lines.append(f"quesst14Database/{folder}/{name}.wav {language}\n")
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000 + number) / 8000)
            write_audio(top / folder / f"{name}.wav", tone, 8000)
        key = "utterances" if folder == "Audio" else "eval"
        (top / "scoring" / f"language_key_{key}.lst").write_text("".join(lines))
    pairs = [("quesst14_00003", "quesst14_eval_0001"), ("quesst14_00002", "quesst14_eval_0002")]
    lines = ["SPKR-INFO quesst14_00001 1 <NA> <NA> <NA> unknown x <NA>\n"]
    lines += [LEXEME.format(document=document, query=query) for document, query in pairs]
    (truth / "quesst14_eval.rttm").write_text("".join(lines))
    return top


def test_the_english_part_is_searched_and_all_of_it_counts(database, tmp_path):
    out = tmp_path / "data" / "quesst14_eval"
    prepared = prepare(database, out, split="eval", nj=2)
    assert prepared.directories[out].utterances == 3
    assert "not searched but counted: 2 recordings" in str(prepared)
    queries, documents = (read_table(out / f"{name}.scp") for name in ("queries", "documents"))
    assert list(queries) == ["quesst14_eval_0001"]
    assert list(documents) == ["quesst14_00001", "quesst14_00003"]
    assert set(read_table(out / "utt2set").values()) == {"quesst14_eval"}
    assert read_table(out / "utt2digest").keys() == queries.keys() | documents.keys()
    absent = read_unsearched(out / "unsearched")
    assert absent == (["quesst14_eval_0002"], ["quesst14_00002"])
    relevant = read_relevance(out / "relevance", [*queries, *absent[0]], [*documents, *absent[1]])
    assert np.array_equal(relevant, [[False, True, False], [False, False, True]])
    x = read_audio(documents["quesst14_00001"], 16000)
    assert len(x) == 8000
    assert np.abs(x[1000:-1000]).max() == pytest.approx(0.5 * 10 ** (-3 / 20), rel=1e-2)


def test_what_is_wrong_is_named(database, tmp_path):
    def fails(message):
        with pytest.raises(InputError, match=message):
            prepare(database, tmp_path / "out", split="eval")
        assert not (tmp_path / "out").exists()

    keys = database / "scoring" / "language_key_eval.lst"
    text = keys.read_text()
    keys.write_text(text + "nothing\n")
    fails("language_key_eval.lst: line 3: 'nothing': must be")
    keys.write_text(text.replace("nnenglish", "basque"))
    fails("nothing in it is nnenglish")
    keys.write_text(text.splitlines()[0] + "\n")
    fails("quesst14_eval_0002 or quesst14_00002 is in no list")
    keys.write_text(text)
    (database / "Audio" / "quesst14_00003.wav").unlink()
    fails("quesst14_00003.wav")
    keys.unlink()
    fails("QUESST14 in db.sh must be the folder quesst14Database")
