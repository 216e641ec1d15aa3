"""Scores of enhanced speech (SI-SDR, STOI, PESQ) and of transcripts (error rates)."""

import logging
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jiwer
import numpy as np
import pystoi

from posinv.audio import read_audio
from posinv.datadir import map_parallel, read_table
from posinv.errors import InputError

try:
    import pesq
except ImportError:
    pesq = None

Unit = Literal["word", "phone", "char"]

ENHANCEMENT_METRICS = ("si_sdr", "stoi", "pesq")
PESQ_MODES = {8000: "nb", 16000: "wb"}


def si_sdr(est: np.ndarray, ref: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, of zero-mean signals.

    J. Le Roux et al., "SDR – half-baked or well done?", ICASSP 2019.

    Args:
        est: the estimate, (T,).
        ref: the reference, (T,).

    Returns:
        The ratio; infinite for a scaled copy of the reference, NaN where either signal is
        constant.
    """
    est, ref = (np.asarray(x, dtype=np.float64) - np.mean(x, dtype=np.float64) for x in (est, ref))
    if not (est.any() and ref.any()):
        return math.nan
    target = (est @ ref) / (ref @ ref) * ref
    distortion = est - target
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((target @ target) / (distortion @ distortion)))


def has_pesq(fs: int) -> bool:
    """Whether PESQ can be had: the package ``pesq``, and a rate of 8 or 16 kHz."""
    return pesq is not None and fs in PESQ_MODES


def enhancement_scores(ref: np.ndarray, est: np.ndarray, fs: int) -> dict[str, float]:
    """Scores of one enhanced utterance.

    Args:
        ref: the clean reference, (T,), in [-1, 1].
        est: the enhanced speech, (T,), in [-1, 1].
        fs: sampling rate in Hz.

    Returns:
        ``si_sdr`` in dB; ``stoi`` (C. Taal et al., 2011), at most 1; ``pesq``, the MOS-LQO of
        ITU-T P.862.2 (wideband) at 16 kHz, of P.862.1 (narrowband) at 8 kHz, if
        :func:`has_pesq`. NaN where a score is undefined: silence, or speech too short or too
        quiet for it (STOI takes 30 frames, about 0.4 s; PESQ 0.25 s).

    Raises:
        InputError: different lengths.
    """
    if ref.shape != est.shape:
        raise InputError(f"reference of {ref.size} samples, enhanced speech of {est.size}")
    scores = {"si_sdr": si_sdr(est, ref), "stoi": _stoi(ref, est, fs)}
    if has_pesq(fs):
        scores["pesq"] = _pesq(ref, est, fs)
    return scores


def _stoi(ref: np.ndarray, est: np.ndarray, fs: int) -> float:
    if not ref.any():
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(pystoi.stoi(ref, est, fs))
        except (RuntimeWarning, np.exceptions.AxisError):  # fewer than 30 frames; less than one
            return math.nan


def _pesq(ref: np.ndarray, est: np.ndarray, fs: int) -> float:
    if not (ref.any() and est.any()):
        return math.nan
    try:
        return float(pesq.pesq(fs, ref, est, PESQ_MODES[fs]))
    except (pesq.NoUtterancesError, pesq.BufferTooShortError):
        return math.nan


def score_enhancement(
    ref_scp: Path | str,
    inf_scp: Path | str,
    utt2set: Path | str,
    sampling_rate: int = 16000,
    nj: int = 2,
) -> tuple[dict[str, dict[str, float | int | None]], list[dict[str, str | float]]]:
    """Score enhanced speech, utterance by utterance and in the mean over each set.

    Args:
        ref_scp: clean references, ``<id> <audio>``.
        inf_scp: enhanced speech, the same ids.
        utt2set: ``<id> <set>``, the same ids.
        sampling_rate: of all audio, in Hz.
        nj: number of processes.

    Returns:
        For each set, the means ``si_sdr``, ``stoi`` and ``pesq`` over the utterances that have
        a finite score (None if there are none), the number of ``utterances``, and how many
        have none: ``si_sdr_failed`` and so on (``pesq_failed`` is None without PESQ). Then
        the scores of each utterance: ``utterance``, ``set`` and those of
        :func:`enhancement_scores`.

    Raises:
        InputError: ids that don't match; audio that cannot be read or has another rate; lengths
            that don't match.
    """
    ref, inf, sets = read_table(ref_scp), read_table(inf_scp), read_table(utt2set)
    _require_same_ids(ref, inf, ref_scp, inf_scp)
    _require_same_ids(ref, sets, ref_scp, utt2set)
    if not has_pesq(sampling_rate):
        why = "it takes 8 or 16 kHz" if pesq else "the package pesq is not installed"
        logging.warning("PESQ is left out: %s", why)

    def score(utterance: str) -> dict[str, float]:
        try:
            audio = [read_audio(scp[utterance], sampling_rate) for scp in (ref, inf)]
            return enhancement_scores(*audio, sampling_rate)
        except InputError as error:
            raise InputError(f"{inf_scp}: utterance {utterance}: {error}") from error

    scores = map_parallel(score, ref, nj)
    rows = [
        {"utterance": utterance, "set": sets[utterance], **row}
        for utterance, row in zip(ref, scores, strict=True)
    ]
    means = {}
    for name, utterances in _by_set(sets).items():
        members = [row for row in rows if row["set"] == name]
        means[name] = _summarise(members) | {"utterances": len(utterances)}
        for metric in ENHANCEMENT_METRICS:
            if means[name][f"{metric}_failed"]:
                logging.warning(
                    "%s: %s is undefined for %d of %d utterances, which its mean leaves out",
                    *(name, metric, means[name][f"{metric}_failed"], len(utterances)),
                )
    return means, rows


def _summarise(rows: list[dict[str, str | float]]) -> dict[str, float | int | None]:
    summary: dict[str, float | int | None] = {}
    for metric in ENHANCEMENT_METRICS:
        values = [row[metric] for row in rows if metric in row]
        finite = [value for value in values if math.isfinite(value)]
        summary[metric] = float(np.mean(finite)) if finite else None
        summary[f"{metric}_failed"] = len(values) - len(finite) if values else None
    return summary


@dataclass(frozen=True)
class ErrorRate:
    """Edit errors of a corpus: substitutions, insertions and deletions, and reference tokens."""

    sub: int
    ins: int
    dels: int
    ref_tokens: int

    @property
    def errors(self) -> int:
        """All edit errors."""
        return self.sub + self.ins + self.dels

    @property
    def rate(self) -> float:
        """Errors per reference token, in %; above 100 if insertions abound."""
        return 100 * self.errors / self.ref_tokens

    def to_dict(self) -> dict[str, float | int]:
        """Return what ``scores.json`` holds."""
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
        refs: reference transcripts by utterance id. One may be empty: what its hypothesis
            holds counts as insertions.
        hyps: hypotheses, the same ids.
        unit: ``"word"`` and ``"phone"`` split at blanks; ``"char"`` counts every character,
            one blank between words among them.

    Raises:
        InputError: ids that don't match; no reference token at all.
    """
    _require_same_ids(refs, hyps, "the references", "the hypotheses")
    aligned = _align(refs, hyps, unit)
    tokens = aligned.hits + aligned.substitutions + aligned.deletions
    if not tokens:
        raise InputError("the references hold no token, so they have no error rate")
    return ErrorRate(aligned.substitutions, aligned.insertions, aligned.deletions, tokens)


def alignment_text(refs: Mapping[str, str], hyps: Mapping[str, str], unit: Unit = "word") -> str:
    """Alignments of the utterances that have errors, to be read by people."""
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
    process = jiwer.process_characters if unit == "char" else jiwer.process_words
    ids = list(refs)
    return process(*([" ".join(texts[i].split()) for i in ids] for texts in (refs, hyps)))


def read_transcripts(ref: Path | str, hyp: Path | str) -> tuple[dict[str, str], dict[str, str]]:
    """Read references and hypotheses, ``<id> <transcript>`` each.

    Raises:
        InputError: a file that cannot be read; ids that don't match.
    """
    refs, hyps = (read_table(path, allow_empty=True) for path in (ref, hyp))
    _require_same_ids(refs, hyps, ref, hyp)
    return refs, hyps


def score_text(
    ref: Path | str, hyp: Path | str, utt2set: Path | str, unit: Unit
) -> tuple[dict[str, dict[str, float | int]], str]:
    """Score hypotheses, set by set.

    Args:
        ref: reference transcripts, ``<id> <transcript>``.
        hyp: hypotheses, the same ids.
        utt2set: ``<id> <set>``, the same ids.
        unit: of the error rate, as in :func:`error_rate`.

    Returns:
        :meth:`ErrorRate.to_dict` for each set, and the alignments with errors as text.

    Raises:
        InputError: a file that cannot be read; ids that don't match; a set without reference
            tokens.
    """
    refs, hyps = read_transcripts(ref, hyp)
    sets = read_table(utt2set)
    _require_same_ids(refs, sets, ref, utt2set)
    scores, texts = {}, []
    for name, ids in _by_set(sets).items():
        of_set = [{i: table[i] for i in ids} for table in (refs, hyps)]
        try:
            result = error_rate(*of_set, unit)
        except InputError as error:
            raise InputError(f"{ref}: set {name}: {error}") from error
        scores[name] = result.to_dict()
        texts.append(
            f"##### {name}: {unit} error rate {result.rate:.2f} % ({result.errors} errors in "
            f"{result.ref_tokens}: {result.sub} substituted, {result.ins} inserted, "
            f"{result.dels} deleted)\n\n{alignment_text(*of_set, unit)}"
        )
    return scores, "\n".join(texts)


def _require_same_ids(
    first: Mapping[str, str],
    second: Mapping[str, str],
    first_name: Path | str,
    second_name: Path | str,
) -> None:
    for table, name, other, other_name in (
        (second, second_name, first, first_name),
        (first, first_name, second, second_name),
    ):
        if missing := other.keys() - table.keys():
            raise InputError(
                f"{name}: no utterance {min(missing)}, which is in {other_name} "
                f"({len(missing)} such): both must list the same utterances"
            )


def _by_set(sets: Mapping[str, str]) -> dict[str, list[str]]:
    names = dict.fromkeys(sets.values())
    return {name: [i for i, of_set in sets.items() if of_set == name] for name in names}
