"""Pronunciation lexicons: words to phonemes."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from posinv.corpora.g2p import G2P
from posinv.data.files import read_text
from posinv.errors import InputError

SHOWN = 50  # words in a message
PROBABILITY = re.compile(r"\d*\.\d+([eE]-?\d+)?")
NOT_SPELLED = re.compile(r"[\d<>\[\](){}]")  # markers such as <unk>, [noise], and digits


class Lexicon:
    """Words to phonemes.

    As SUPERB's phoneme recognition has it (S3PRL, ``downstream/ctc/corpus/libriphone.py``): a
    word has its first pronunciation, stress stays on the vowels (``AH0``, ``AH1``), and there is no
    token for silence or the end of a word. SUPERB's two lexicons have every word of LibriSpeech.
    The pronunciation of another word is predicted by :class:`posinv.corpora.g2p.G2P`, which is
    learnt from the lexicon when it is first needed.

    Args:
        pronunciations: word to phonemes, separated by spaces. Case doesn't matter.
        g2p: predict the words that aren't there (True), or refuse them.

    Attributes:
        predicted: the words that aren't in the lexicon, and how often each was asked for.
    """

    def __init__(self, pronunciations: Mapping[str, str], g2p: bool = True):
        self.predicted: Counter[str] = Counter()
        self._g2p = g2p
        self._guesses: dict[str, list[str]] = {}
        self._known: dict[str, str] = {}
        for word, phonemes in pronunciations.items():
            self._known.setdefault(word.upper(), phonemes)

    @classmethod
    def read(cls, paths: Path | str | Iterable[Path | str], g2p: bool = True) -> "Lexicon":
        """Read lexicon files. If several have a word, the first file's pronunciation counts.

        Lines are ``WORD P1 P2 ...``, separated by spaces or tabs, as in LibriSpeech's lexicons.
        Probabilities between the word and its phonemes (Kaldi's ``lexiconp.txt``, MFA's
        dictionaries), numbers with a decimal point, are left out.
        Further pronunciations repeat the word or, as CMU Sphinx and CMUdict write, number it:
        ``WORD(2)``. Empty lines and CMUdict's comments (``;;;`` in front, ``#`` behind) don't
        count.

        Raises:
            InputError: a file that isn't there, isn't UTF-8 or has no words; a word without
                phonemes.
        """
        pronunciations: dict[str, str] = {}
        for path in [paths] if isinstance(paths, str | Path) else paths:
            found = dict(reversed(list(_read(Path(path)))))  # the first of a word stays
            if not found:
                raise InputError(f"{path}: no words in it: name a pronunciation lexicon")
            pronunciations = found | pronunciations
        if not pronunciations:
            raise InputError("no lexicon: name at least one file")
        return cls(pronunciations, g2p)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, word: str) -> bool:
        return word.upper() in self._known

    def phonemes(self, word: str) -> list[str]:
        """Return a word's phonemes, at least one.

        Raises:
            InputError: a word that isn't in the lexicon, with ``g2p`` off or not of the letters of
                the words there.
        """
        word = word.upper()
        if word in self._known:
            return self._known[word].split()
        if why := self._why_not(word):
            raise InputError(f"'{word}' {why}: add it to the lexicon, or correct the transcript")
        self.predicted[word] += 1
        return self._predict(word)

    def _why_not(self, word: str) -> str:
        """Say why a word that isn't in the lexicon has no pronunciation; nothing if it has one."""
        if not self._g2p:
            return "isn't in the lexicon"
        if NOT_SPELLED.search(word):
            return "isn't in the lexicon, and not spelled as words are"
        if unknown := sorted(set(word) - self._g2p_model.letters):
            return f"isn't in the lexicon, no word of which has {' '.join(unknown)}"
        return (
            "" if self._predict(word) else "isn't in the lexicon, nor do its letters tell a sound"
        )

    def transcribe(self, text: str) -> str:
        """Return the phonemes of a text's words, separated by spaces, as ``phn`` has them.

        Raises:
            InputError: as :meth:`phonemes`.
        """
        return " ".join(phoneme for word in text.split() for phoneme in self.phonemes(word))

    def transcribe_all(self, text: Mapping[str, str]) -> dict[str, str]:
        """Return ``phn`` for ``text``, both by utterance.

        Raises:
            InputError: as :meth:`phonemes`; the message names all such words, most frequent first,
                with how often they occur, and an utterance of the first.
        """
        counts = Counter(word.upper() for words in text.values() for word in words.split())
        refused = [
            (word, count, why)
            for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
            if word not in self._known and (why := self._why_not(word))
        ]
        if refused:
            utt = next(utt for utt in text if refused[0][0] in text[utt].upper().split())
            words = "; ".join(f"'{word}' ({count}) {why}" for word, count, why in refused[:SHOWN])
            more = f"; ... ({len(refused)} words in all)" * (len(refused) > SHOWN)
            raise InputError(
                f"utterance {utt}: {words}{more}: add them to the lexicon, or correct the text"
            )
        return {utt: self.transcribe(words) for utt, words in text.items()}

    def describe_predicted(self, examples: int = 5) -> str:
        """Return a line for the log: how many words were predicted, the most frequent ones."""
        if not self.predicted:
            return "every word is in the lexicon"
        frequent = sorted(self.predicted, key=lambda word: (-self.predicted[word], word))
        shown = "; ".join(f"{word} {' '.join(self._predict(word))}" for word in frequent[:examples])
        return (
            f"{self.predicted.total()} words ({len(frequent)} different) aren't in the lexicon "
            f"and were predicted: {shown}{'; ...' * (len(frequent) > examples)}"
        )

    def _predict(self, word: str) -> list[str]:
        if word not in self._guesses:
            self._guesses[word] = self._g2p_model(word)
        return self._guesses[word]

    @cached_property
    def _g2p_model(self) -> G2P:
        return G2P(self._known)


def _read(path: Path) -> Iterator[tuple[str, str]]:
    lines = read_text(path, "name a pronunciation lexicon").split("\n")
    for number, line in enumerate(lines, 1):
        word, *phonemes = line.split(" #")[0].split() or [""]
        if not word or word.startswith(";;;"):
            continue
        while phonemes and PROBABILITY.fullmatch(phonemes[0]):
            del phonemes[0]
        if not phonemes:
            raise InputError(f"{path}: line {number}: no phonemes of '{word}': add them")
        yield re.sub(r"(?<=.)\(\d+\)$", "", word).upper(), " ".join(phonemes)
