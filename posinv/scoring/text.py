"""Error rates of transcripts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jiwer

from posinv.data.tables import read_table
from posinv.errors import InputError

Unit = Literal["word", "phone", "char"]
UTTERANCE_COLUMNS = ("utterance", "set", "errors", "ref_tokens", "ref", "hyp")


@dataclass(frozen=True)
class ErrorRate:
    """Counts over a corpus: substitutions, insertions, deletions and reference tokens."""

    sub: int
    ins: int
    dels: int
    ref_tokens: int

    @property
    def errors(self) -> int:
        """Substitutions, insertions and deletions together."""
        return self.sub + self.ins + self.dels

    @property
    def rate(self) -> float:
        """Errors per reference token, in %; many insertions can make it more than 100."""
        return 100 * self.errors / self.ref_tokens

    def to_dict(self) -> dict[str, float | int]:
        """Return the counts and the rate, as ``scores.json`` holds them."""
        return {
            "rate": self.rate,
            "errors": self.errors,
            "sub": self.sub,
            "ins": self.ins,
            "del": self.dels,
            "ref_tokens": self.ref_tokens,
        }


def error_rate(refs: Mapping[str, str], hyps: Mapping[str, str], unit: Unit = "word") -> ErrorRate:
    """Error rate of a corpus: all errors over all reference tokens.

    Args:
        refs: reference transcripts by utterance id. Where one is empty, all tokens of its
            hypothesis count as insertions.
        hyps: hypotheses by utterance id.
        unit: the tokens. ``"word"`` and ``"phone"`` split transcripts at blanks; with ``"char"``,
            every character is a token, and so is one blank between two words.

    Raises:
        InputError: utterance ids that don't match; no reference token at all.
    """
    require_same_ids(refs, hyps, "the references", "the hypotheses")
    aligned = _align(refs, hyps, unit)
    tokens = aligned.hits + aligned.substitutions + aligned.deletions
    if not tokens:
        raise InputError("the references hold no token, so they have no error rate")
    return ErrorRate(aligned.substitutions, aligned.insertions, aligned.deletions, tokens)


def alignment_text(refs: Mapping[str, str], hyps: Mapping[str, str], unit: Unit = "word") -> str:
    """Return the alignments of the utterances with errors, as text for people to read."""
    ids = list(refs)
    return re.sub(
        r"^=== SENTENCE (\d+) ===$",
        lambda match: f"=== {ids[int(match[1]) - 1]} ===",
        jiwer.visualize_alignment(_align(refs, hyps, unit), show_measures=False),
        flags=re.MULTILINE,
    )


def _align(
    refs: Mapping[str, str], hyps: Mapping[str, str], unit: Unit
) -> jiwer.WordOutput | jiwer.CharacterOutput:
    references, hypotheses = ([" ".join(texts[i].split()) for i in refs] for texts in (refs, hyps))
    process = jiwer.process_characters if unit == "char" else jiwer.process_words
    return process(references, hypotheses)


def aligned_tokens(ref: str, hyp: str) -> list[tuple[str, str, str]]:
    """Align two transcripts whose tokens stand between blanks.

    Returns:
        (kind, reference's tokens, hypothesis' tokens) of each piece, in order; kind is ``equal``,
        ``substitute``, ``insert`` or ``delete``. An insertion has no reference, a deletion no
        hypothesis: there the string is empty.
    """
    aligned = _align({"": ref}, {"": hyp}, "word")
    refs, hyps = ref.split(), hyp.split()
    return [
        (
            chunk.type,
            " ".join(refs[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(hyps[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in aligned.alignments[0]
    ]


def _utterances(
    refs: Mapping[str, str], hyps: Mapping[str, str], name: str, unit: Unit
) -> list[dict[str, str | int]]:
    """Return the rows of a set's utterances, with :data:`UTTERANCE_COLUMNS`."""
    aligned = _align(refs, hyps, unit)
    rows: list[dict[str, str | int]] = []
    for utterance, tokens, chunks in zip(refs, aligned.references, aligned.alignments, strict=True):
        wrong = [chunk for chunk in chunks if chunk.type != "equal"]
        sides = [(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in wrong]
        rows.append(
            {
                "utterance": utterance,
                "set": name,
                "errors": sum(max(side) for side in sides),
                "ref_tokens": len(tokens),
                "ref": " ".join(refs[utterance].split()),
                "hyp": " ".join(hyps[utterance].split()),
            }
        )
    return rows


def read_transcripts(ref: Path | str, hyp: Path | str) -> tuple[dict[str, str], dict[str, str]]:
    """Read references and hypotheses, files of ``<utterance id> <transcript>`` lines.

    Raises:
        InputError: a file that cannot be read; utterance ids that don't match.
    """
    refs, hyps = (read_table(path, allow_empty=True) for path in (ref, hyp))
    require_same_ids(refs, hyps, ref, hyp)
    return refs, hyps


def score_text(
    ref: Path | str, hyp: Path | str, utt2set: Path | str, unit: Unit
) -> tuple[dict[str, dict[str, float | int]], list[dict[str, str | int]], str]:
    """Compute the error rate of each test set, and the errors of each utterance.

    Args:
        ref: reference transcripts, ``<utterance id> <transcript>`` lines.
        hyp: hypotheses of the same utterances.
        utt2set: test sets of the same utterances, ``<utterance id> <set>`` lines.
        unit: the tokens, see :func:`error_rate`.

    Returns:
        :meth:`ErrorRate.to_dict` for each set; a row with :data:`UTTERANCE_COLUMNS` for each
        utterance; and the alignments with errors as text.

    Raises:
        InputError: a file that cannot be read; utterance ids that don't match; a set without
            reference tokens.
    """
    refs, hyps = read_transcripts(ref, hyp)
    sets = read_table(utt2set)
    require_same_ids(refs, sets, ref, utt2set)
    scores, rows, texts = {}, [], []
    for name, ids in by_set(sets).items():
        set_refs, set_hyps = ({i: table[i] for i in ids} for table in (refs, hyps))
        try:
            result = error_rate(set_refs, set_hyps, unit)
        except InputError as error:
            raise InputError(f"{ref}: set {name}: {error}") from error
        scores[name] = result.to_dict()
        rows += _utterances(set_refs, set_hyps, name, unit)
        texts.append(
            f"##### {name}: {unit} error rate {result.rate:.2f} % ({result.errors} errors in "
            f"{result.ref_tokens}: {result.sub} substituted, {result.ins} inserted, "
            f"{result.dels} deleted)\n\n{alignment_text(set_refs, set_hyps, unit)}"
        )
    return scores, rows, "\n".join(texts)


def require_same_ids(
    first: Mapping[str, object],
    second: Mapping[str, object],
    first_name: Path | str,
    second_name: Path | str,
) -> None:
    """Raise InputError unless two tables, named as given, have the same utterance ids."""
    for table, name, other, other_name in (
        (second, second_name, first, first_name),
        (first, first_name, second, second_name),
    ):
        if missing := other.keys() - table.keys():
            raise InputError(
                f"{name}: no utterance {min(missing)}, which is in {other_name} "
                f"({len(missing)} such): both must list the same utterances"
            )


def by_set(sets: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the utterance ids of each set, from the set of each utterance id."""
    names = dict.fromkeys(sets.values())
    return {name: [i for i, of_set in sets.items() if of_set == name] for name in names}
