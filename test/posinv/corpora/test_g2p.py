from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posinv.augment.draws import generator
from posinv.corpora import g2p as module
from posinv.corpora.g2p import G2P, KneserNey
from posinv.errors import InputError


class Naive:
    """Interpolated Kneser-Ney, from its definition."""

    def __init__(self, words, order):
        self.order, self.size = order, max(map(max, words))
        padded = [[0] * (order - 1) + list(word) + [1] for word in words]
        self.counts = []
        for n in range(1, order + 1):
            raw, before = Counter(), {}
            for word in padded:
                for end in range(order, len(word) + 1):
                    gram = tuple(word[end - n : end])
                    raw[gram] += 1
                    before.setdefault(gram, set()).add(tuple(word[end - n - 1 : end]))
            whole = n == order
            self.counts.append(
                {g: c if whole or g[0] == 0 else len(before[g]) for g, c in raw.items()}
            )

    def probability(self, context, token):
        p = 1 / self.size
        for n, counts in enumerate(self.counts, 1):
            start = tuple(context[len(context) - n + 1 :])
            seen = {gram: count for gram, count in counts.items() if gram[:-1] == start}
            if not seen:
                continue
            number = Counter(counts.values())
            discount = number[1] / (number[1] + 2 * number[2]) if number[1] * number[2] else 0.5
            total = sum(seen.values())
            rest = discount * len(seen) / total * p
            p = max(seen.get((*start, token), 0) - discount, 0) / total + rest
        return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_is_its_definition(order):
    rng = generator("kneser-ney", order)
    words = [list(rng.integers(2, 6, rng.integers(1, 7))) for _ in range(30)]
    words[0][0] = 5
    model = KneserNey(np.concatenate(words), np.array([len(word) for word in words]), order)
    naive = Naive(words, order)
    prefixes = [word[:cut] for word in words[:9] for cut in range(len(word) + 1)] + [[5, 5, 5, 5]]
    contexts = [([0] * (order - 1) + prefix)[len(prefix) :] for prefix in prefixes]
    contexts = np.array(contexts).reshape(len(prefixes), order - 1)
    tokens = np.arange(1, 6)
    expected = [[naive.probability(list(c), token) for token in tokens] for c in contexts]
    p = model.probabilities(contexts, tokens)
    np.testing.assert_allclose(p, expected, rtol=1e-12)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)


def alignments(word, sounds, num_phonemes):
    """All sequences of (letter, code)."""
    if not word:
        return [] if sounds else [()]
    found = []
    for size in range(min(2, len(sounds)) + 1):
        first, rest = sounds[:size], sounds[size:]
        if size == 2:
            code = 1 + num_phonemes + first[0] * num_phonemes + first[1]
        else:
            code = 1 + first[0] if size else 0
        assert module._sounds_of(code, num_phonemes) == tuple(first)
        found += [((word[0], code), *a) for a in alignments(word[1:], rest, num_phonemes)]
    return found


def test_alignment_by_enumeration():
    rng = generator("alignment")
    words = [list(rng.integers(0, 3, n)) for n in (3, 4, 2, 1, 5)]
    sounds = [list(rng.integers(0, 2, n)) for n in (3, 2, 4, 2, 6)]
    words[0][0], sounds[0][0] = 2, 1
    weights = rng.uniform(size=(3, 1 + 2 + 4))
    expected, best = np.zeros_like(weights), []
    for word, said in zip(words, sounds, strict=True):
        found = alignments(word, said, 2)
        scores = np.array([np.prod([weights[step] for step in steps]) for steps in found])
        for steps, score in zip(found, scores / scores.sum(), strict=True):
            for step in steps:
                expected[step] += score
        best += [code for _, code in found[scores.argmax()]]
    ends = [np.cumsum([0, *map(len, x)]) for x in (words, sounds)]
    data = np.concatenate(words), np.concatenate(sounds), *ends, weights
    np.testing.assert_allclose(module._expected_counts(*data), expected, rtol=1e-12)
    assert list(module._best_codes(*data)) == best


def say(word):
    """A regular orthography: silent h, x of two phonemes, c that depends on what follows."""
    sounds = {"A": "AA1", "I": "IY0", "B": "B", "X": "K S", "H": "", "T": "T"}
    said = [
        ("CH" if word[i + 1 : i + 2] == "I" else "K") if letter == "C" else sounds[letter]
        for i, letter in enumerate(word)
    ]
    return " ".join(filter(None, said))


def test_a_regular_orthography_is_learnt():
    rng = generator("orthography")
    words = {"".join(rng.choice(list("AIBXHTC"), rng.integers(2, 9))) for _ in range(900)}
    words = sorted(word for word in words if say(word))
    g2p = G2P({word: say(word) for word in words[::2]})
    for word in words[1::2]:
        assert " ".join(g2p(word)) == say(word)
    assert g2p.letters == set("AIBXHTC")
    assert g2p("") == []


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text("ABC'", min_size=1, max_size=6),
        st.lists(st.sampled_from(["P", "T", "K"]), min_size=1, max_size=8).map(" ".join),
        min_size=1,
    ),
    st.text("ABC'D", max_size=8),
)
def test_any_lexicon_will_do(pronunciations, word):
    if all(len(said.split()) > 2 * len(w) for w, said in pronunciations.items()):
        with pytest.raises(InputError, match="no word to learn spelling from"):
            G2P(pronunciations)
        return
    g2p = G2P(pronunciations)
    word = "".join(letter for letter in word if letter in g2p.letters)
    said = g2p(word)
    assert set(said) <= {"P", "T", "K"} and len(said) <= 2 * len(word)
    assert G2P(pronunciations)(word) == said
