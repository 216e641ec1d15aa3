import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posinv.corpora.lexicon import Lexicon
from posinv.errors import InputError

LIBRISPEECH = "A\tAH0\nA\tEY1\nA'BODY\tEY1 B AA2 D IY0\nREAD  R EH1 D\n\nREAD\tR IY1 D\n"
SPHINX = "A AX\nA(2) EY\nZERO Z IH R OW\nZERO(2)  Z IY R OW\nTWO(3) T UW\n"
CMUDICT = ";;; comment\nread R IY1 D\nd'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french\n"


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_the_first_pronunciation_of_the_first_file_counts(tmp_path):
    files = [
        write(tmp_path / "libri.txt", LIBRISPEECH),
        write(tmp_path / "sphinx.dic", SPHINX),
        write(tmp_path / "cmu dict", CMUDICT),
    ]
    lexicon = Lexicon.read(files)
    assert lexicon.transcribe("A READ ZERO  two") == "AH0 R EH1 D Z IH R OW T UW"
    assert lexicon.transcribe("D'Artagnan") == "D AH0 R T AE1 NG Y AH0 N"
    assert len(lexicon) == 6 and "zero" in lexicon and "A(2)" not in lexicon
    assert lexicon.transcribe("") == ""
    assert Lexicon.read(files[::-1]).transcribe("A READ") == "AX R IY1 D"
    assert Lexicon.read(files[0]).phonemes("a'body") == ["EY1", "B", "AA2", "D", "IY0"]
    assert lexicon.describe_predicted() == "every word is in the lexicon"


words = st.text(string.ascii_letters + "'.-_()#;", min_size=1).filter(
    lambda word: not word.startswith(";;;") and not word.endswith(")")
)
phonemes = st.lists(st.sampled_from(["AH0", "B", "UW1", "ZH"]), min_size=1, max_size=9)


@given(
    st.lists(st.tuples(words, phonemes), min_size=1),
    st.sampled_from([" ", "\t", "  ", " \t"]),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_what_is_written_is_read(tmp_path_factory, entries, space, newline):
    expected, seen = {}, {}
    lines = []
    for word, said in entries:
        key = word.upper()
        seen[key] = seen.get(key, 0) + 1
        shown = word if seen[key] == 1 else f"{word}({seen[key]})"
        lines.append(f"{shown}{space}{space.join(said)}")
        expected.setdefault(key, said)
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.txt"
    path.write_bytes((newline.join(lines) + newline).encode())
    lexicon = Lexicon.read([path], g2p=False)
    assert len(lexicon) == len(expected)
    for word, said in expected.items():
        assert lexicon.phonemes(word) == lexicon.phonemes(word.lower()) == said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A AH0\nB\n", r"l.txt: line 2: no phonemes of 'B': add them"),
        ("", r"l.txt: no words in it: name a pronunciation lexicon"),
        (";;; A AH0\n", r"l.txt: no words in it"),
    ],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        Lexicon.read(write(tmp_path / "l.txt", content))


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"l.txt: no such file: name a pronun"):
        Lexicon.read([tmp_path / "l.txt"])
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"l.txt: line 1: not UTF-8 text"):
        Lexicon.read([tmp_path / "l.txt"])
    with pytest.raises(InputError, match="no lexicon: name at least one file"):
        Lexicon.read([])


def test_unknown_words_without_g2p():
    lexicon = Lexicon({"A": "AH0"}, g2p=False)
    with pytest.raises(InputError, match=r"'HOUSE' isn't in the lexicon: add it to the lexicon"):
        lexicon.transcribe("a house")


def test_all_unknown_words_are_named_at_once():
    lexicon = Lexicon({"A": "AH0"}, g2p=False)
    with pytest.raises(
        InputError,
        match=r"utterance u2: 'BIG' \(2\) isn't in the lexicon; 'HOUSE' \(1\) isn't in the lex",
    ):
        lexicon.transcribe_all({"u1": "a", "u2": "a big house", "u3": "big"})
    many = {f"u{number}": f"w{number}" for number in range(60)}
    with pytest.raises(InputError, match=r"\.\.\. \(60 words in all\)"):
        lexicon.transcribe_all(many)


@pytest.mark.parametrize("word", ["<unk>", "[NOISE]", "(laughter)", "7", "mp3", "café"])
def test_what_is_not_spelled_as_a_word_is_not_predicted(word):
    lexicon = Lexicon({"CAFE": "K AE F EY", "<SIL>": "S IH L"})
    with pytest.raises(InputError, match="isn't in the lexicon"):
        lexicon.transcribe_all({"u": f"cafe {word}"})


def test_probabilities_are_not_phonemes(tmp_path):
    """Kaldi's lexiconp.txt and the dictionaries of the Montreal Forced Aligner."""
    content = "A 1.0 AH0\nB\t0.99\t0.2\t1.0\t1.0\tB IY1\nC .5 S IY1\nD 1e-3 D\nE 2\n"
    lexicon = Lexicon.read(write(tmp_path / "lexiconp.txt", content.replace(" 1e-3", " 1.5e-3")))
    said = {"A": "AH0", "B": "B IY1", "C": "S IY1", "D": "D", "E": "2"}
    assert {word: lexicon.transcribe(word) for word in said} == said


def test_byte_order_mark(tmp_path):
    path = tmp_path / "l.txt"
    path.write_text("A AH0\nB B IY1\n", encoding="utf-8-sig")
    assert Lexicon.read(path).transcribe("a b") == "AH0 B IY1"


def test_unknown_words_are_predicted_and_counted():
    known = {"CAT": "K AE1 T", "CATS": "K AE1 T S", "TAC": "T AE1 K", "ACT": "AE1 K T"}
    lexicon = Lexicon(known)
    assert lexicon.transcribe("cat cast tacs CAST") == ("K AE1 T K AE1 S T T AE1 K S K AE1 S T")
    assert lexicon.predicted == {"CAST": 2, "TACS": 1}
    assert lexicon.describe_predicted(1) == (
        "3 words (2 different) aren't in the lexicon and were predicted: CAST K AE1 S T; ..."
    )
    with pytest.raises(InputError, match=r"'X7' isn't in the lexicon, and not spelled as words"):
        lexicon.phonemes("x7")
    assert lexicon.predicted.total() == 3
