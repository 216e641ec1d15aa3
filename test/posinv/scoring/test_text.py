import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.errors import InputError
from posinv.scoring.text import (
    UTTERANCE_COLUMNS,
    _utterances,
    aligned_tokens,
    alignment_text,
    error_rate,
    score_text,
)


def levenshtein(ref: list[str], hyp: list[str]) -> int:
    row = list(range(len(hyp) + 1))
    for i, r in enumerate(ref, 1):
        diagonal, row[0] = row[0], i
        for j, h in enumerate(hyp, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (r != h))
    return row[-1]


words = st.lists(st.sampled_from(["a", "b", "aa", "é"]), max_size=7)


class TestErrorRate:
    @settings(max_examples=200, deadline=None)
    @given(corpus=st.lists(st.tuples(words, words), min_size=1, max_size=4))
    def test_against_levenshtein(self, corpus):
        refs = {str(i): " ".join(ref) for i, (ref, _) in enumerate(corpus)}
        hyps = {str(i): "  ".join(hyp) + " " for i, (_, hyp) in enumerate(corpus)}
        for unit in ("word", "phone", "char"):
            pairs = [
                (list(" ".join(ref)), list(" ".join(hyp))) if unit == "char" else (ref, hyp)
                for ref, hyp in corpus
            ]
            tokens = sum(len(ref) for ref, _ in pairs)
            if not tokens:
                with pytest.raises(InputError, match="hold no token"):
                    error_rate(refs, hyps, unit)
                continue
            rate = error_rate(refs, hyps, unit)
            assert rate.errors == sum(levenshtein(*pair) for pair in pairs)
            assert rate.ref_tokens == tokens
            assert rate.ins - rate.dels == sum(len(hyp) - len(ref) for ref, hyp in pairs)
            assert rate.rate == 100 * rate.errors / tokens

    def test_each_kind_of_error(self):
        rate = error_rate({"u": "a b c d e"}, {"u": "a x c d"})
        assert rate.to_dict() == {
            **{"rate": 40.0, "errors": 2, "sub": 1, "ins": 0, "del": 1, "ref_tokens": 5}
        }

    def test_empty_reference_counts_insertions(self):
        rate = error_rate({"u": "a b", "v": ""}, {"u": "a b", "v": "x y z"})
        assert (rate.ins, rate.errors, rate.ref_tokens, rate.rate) == (3, 3, 2, 150.0)

    def test_corpus_rate_is_not_the_mean_of_rates(self):
        rate = error_rate({"u": "a", "v": "a b c"}, {"u": "x", "v": "a b c"})
        assert rate.rate == 25.0

    def test_case_and_punctuation_count(self):
        assert error_rate({"u": "Don't a"}, {"u": "don't a,"}).errors == 2

    @pytest.mark.parametrize(
        ("refs", "hyps", "message"),
        [
            ({"b": "x", "a": "x"}, {}, r"the hypotheses: no utterance a, .* \(2 such\)"),
            ({"a": "x"}, {"a": "x", "c": "x"}, "the references: no utterance c"),
        ],
    )
    def test_ids_must_match(self, refs, hyps, message):
        with pytest.raises(InputError, match=message):
            error_rate(refs, hyps)


@pytest.mark.parametrize("unit", ["word", "char"])
def test_alignment_text_names_utterances_with_errors(unit):
    text = alignment_text({"good": "a", "spk-1": "a b"}, {"spk-1": "a c", "good": "a"}, unit)
    assert text.startswith("=== spk-1 ===\n\nREF: ")
    assert "good" not in text


class TestScoreText:
    @pytest.fixture
    def files(self, tmp_path):
        (tmp_path / "ref").write_text("u1 a b\nu2 c d\nu3\n")
        (tmp_path / "hyp").write_text("u1 a b\nu2\nu3 x\n")
        (tmp_path / "utt2set").write_text("u1 one\nu2 two\nu3 two\n")
        return [tmp_path / name for name in ("ref", "hyp", "utt2set")]

    def test_sets(self, files):
        scores, utterances, text = score_text(*files, "word")
        assert scores == {
            "one": {"rate": 0, "errors": 0, "sub": 0, "ins": 0, "del": 0, "ref_tokens": 2},
            "two": {"rate": 150, "errors": 3, "sub": 0, "ins": 1, "del": 2, "ref_tokens": 2},
        }
        assert [tuple(row.values()) for row in utterances] == [
            ("u1", "one", 0, 2, "a b", "a b"),
            ("u2", "two", 2, 2, "c d", ""),
            ("u3", "two", 1, 0, "", "x"),
        ]
        assert tuple(utterances[0]) == UTTERANCE_COLUMNS
        assert "##### two: word error rate 150.00 % (3 errors in 2" in text
        assert "=== u2 ===" in text
        assert "=== u1 ===" not in text

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("hyp", "u1 a b\n", r"hyp: no utterance u2, which is in .*ref \(2 such\)"),
            ("ref", "u1 a b\nu2 c\n", r"ref: no utterance u3, which is in .*hyp \(1 such\)"),
            ("utt2set", "u1 one\nu3 two\n", r"utt2set: no utterance u2"),
            ("utt2set", "u1 one\nu2 two\nu3 three\n", r"ref: set three: .* no token"),
            ("hyp", "u1 a\nu1 b\n", r"hyp: line 2: duplicated id u1"),
            ("hyp", "u1 a\n\n", r"hyp: line 2: no id"),
            ("hyp", "u1 a\n u2 a\n", r"hyp: line 2: no id"),
            ("hyp", "", r"hyp: empty: it must list"),
        ],
    )
    def test_bad_files(self, files, name, content, message):
        (files[0].parent / name).write_text(content)
        with pytest.raises(InputError, match=message):
            score_text(*files, "word")

    @settings(deadline=None)
    @given(st.lists(st.tuples(*[st.text("ab ", max_size=8)] * 2), min_size=1, max_size=5))
    @pytest.mark.parametrize("unit", ["word", "char"])
    def test_errors_of_utterances_sum_to_the_sets(self, unit, pairs):
        refs, hyps = ({str(i): pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
        refs["with a token"], hyps["with a token"] = "a", "b"
        rows = _utterances(refs, hyps, "s", unit)
        rate = error_rate(refs, hyps, unit)
        assert sum(row["errors"] for row in rows) == rate.errors
        assert sum(row["ref_tokens"] for row in rows) == rate.ref_tokens
        # And each is the utterance's own.
        for row in rows:
            if row["ref_tokens"]:
                alone = error_rate({"x": row["ref"]}, {"x": row["hyp"]}, unit)
                assert row["errors"] == alone.errors


def test_aligned_tokens():
    assert aligned_tokens("a b c d", "a x c e e") == [
        ("equal", "a", "a"),
        ("substitute", "b", "x"),
        ("equal", "c", "c"),
        ("insert", "", "e"),
        ("substitute", "d", "e"),
    ]
    assert aligned_tokens("", "a") == [("insert", "", "a")]
    assert aligned_tokens("a b", "") == [("delete", "a b", "")]
