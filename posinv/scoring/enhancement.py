"""Scores of enhanced speech: SI-SDR, STOI, PESQ and DNSMOS."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pystoi

from posinv.data.audio import read_audio
from posinv.data.parallel import map_parallel
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.scoring.text import by_set, require_same_ids

try:
    import pesq
except ImportError:
    pesq = None

try:
    from speechmos import dnsmos
except ImportError:
    dnsmos = None

ENHANCEMENT_METRICS = ("si_sdr", "stoi", "pesq", "dnsmos", "dnsmos_sig", "dnsmos_bak")
DNSMOS_NAMES = {"dnsmos": "ovrl_mos", "dnsmos_sig": "sig_mos", "dnsmos_bak": "bak_mos"}
PESQ_MODES = {8000: "nb", 16000: "wb"}


def si_sdr(est: np.ndarray, ref: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, without the signals' means.

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
    """Whether PESQ can be computed: ``pesq`` is installed, and the rate is 8 or 16 kHz."""
    return pesq is not None and fs in PESQ_MODES


def has_dnsmos(fs: int) -> bool:
    """Whether DNSMOS can be computed: ``speechmos`` is installed, and the rate is 16 kHz."""
    return dnsmos is not None and fs == 16000


def enhancement_scores(ref: np.ndarray, est: np.ndarray, fs: int) -> dict[str, float]:
    """Scores of one enhanced utterance.

    Args:
        ref: the clean reference, (T,), in [-1, 1].
        est: the enhanced speech, (T,), in [-1, 1].
        fs: sampling rate in Hz.

    Returns:
        ``si_sdr`` in dB; ``stoi`` (C. Taal et al., 2011), at most 1; and, if :func:`has_pesq`,
        ``pesq``, the MOS-LQO of ITU-T P.862.2 (wideband) at 16 kHz or of P.862.1 (narrowband) at
        8 kHz; and, if :func:`has_dnsmos`, ``dnsmos``, ``dnsmos_sig`` and ``dnsmos_bak``, the
        overall, speech and background quality in 1 to 5 that a network predicts from the enhanced
        speech alone (C. Reddy et al., "DNSMOS P.835", ICASSP 2022; shorter speech is repeated to
        9 s). NaN where a score is undefined: for silence, and for speech that is too quiet or too
        short (STOI needs 30 frames, about 0.4 s; PESQ needs 0.25 s).

    Raises:
        InputError: different lengths.
    """
    if ref.shape != est.shape:
        raise InputError(f"reference of {ref.size} samples, enhanced speech of {est.size}")
    scores = {"si_sdr": si_sdr(est, ref), "stoi": _stoi(ref, est, fs)}
    if has_pesq(fs):
        scores["pesq"] = _pesq(ref, est, fs)
    if has_dnsmos(fs):
        scores |= _dnsmos(est, fs)
    return scores


def _stoi(ref: np.ndarray, est: np.ndarray, fs: int) -> float:
    if not ref.any():
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(pystoi.stoi(ref, est, fs))
        except (RuntimeWarning, np.exceptions.AxisError):  # AxisError: shorter than one frame
            return math.nan


def _pesq(ref: np.ndarray, est: np.ndarray, fs: int) -> float:
    if not (ref.any() and est.any()):
        return math.nan
    try:
        return float(pesq.pesq(fs, ref, est, PESQ_MODES[fs]))
    except (pesq.NoUtterancesError, pesq.BufferTooShortError):
        return math.nan


def _dnsmos(est: np.ndarray, fs: int) -> dict[str, float]:
    if not est.any():
        return dict.fromkeys(DNSMOS_NAMES, math.nan)
    scores = dnsmos.run(np.clip(est, -1, 1), fs)
    return {name: float(scores[key]) for name, key in DNSMOS_NAMES.items()}


def score_enhancement(
    ref_scp: Path | str,
    inf_scp: Path | str,
    utt2set: Path | str,
    sampling_rate: int = 16000,
    nj: int = 2,
    only: Sequence[str] = (),
) -> tuple[dict[str, dict[str, float | int | None]], list[dict[str, str | float]]]:
    """Score each enhanced utterance, and compute the mean scores of each test set.

    Args:
        ref_scp: clean references, ``<utterance id> <audio>`` lines.
        inf_scp: enhanced speech of the same utterances.
        utt2set: test sets of the same utterances, ``<utterance id> <set>`` lines.
        sampling_rate: sampling rate of all audio, in Hz.
        nj: number of processes.
        only: the test sets that are scored; none: all.

    Returns:
        The scores of each set, and a list with the scores of each utterance.

        A set has the mean of each of :data:`ENHANCEMENT_METRICS` over the utterances whose score
        is finite (None if there are none); the number of ``utterances``; and ``si_sdr_failed``
        and so on, the numbers of utterances whose score isn't finite (None if it wasn't
        computed). An utterance has its id, ``utterance``, its ``set``, and the
        scores of :func:`enhancement_scores`.

    Raises:
        InputError: utterance ids that don't match; audio that cannot be read or has another
            sampling rate; a reference and enhanced speech of different lengths; no utterance of a
            set in ``only``.
    """
    ref, inf, sets = read_table(ref_scp), read_table(inf_scp), read_table(utt2set)
    require_same_ids(ref, inf, ref_scp, inf_scp)
    require_same_ids(ref, sets, ref_scp, utt2set)
    if only:
        if unknown := set(only) - set(sets.values()):
            raise InputError(f"--sets {min(unknown)}: {utt2set} has no utterance of it")
        sets = {utterance: name for utterance, name in sets.items() if name in only}
    if not has_pesq(sampling_rate):
        why = "it needs 8 or 16 kHz" if pesq else "the package pesq is not installed"
        logging.warning("PESQ is left out: %s", why)
    if not has_dnsmos(sampling_rate):
        why = "it needs 16 kHz" if dnsmos else "the package speechmos is not installed"
        logging.warning("DNSMOS is left out: %s", why)

    def score(utterance: str) -> dict[str, float]:
        try:
            clean, enhanced = (read_audio(scp[utterance], sampling_rate) for scp in (ref, inf))
            return enhancement_scores(clean, enhanced, sampling_rate)
        except InputError as error:
            raise InputError(f"{inf_scp}: utterance {utterance}: {error}") from error

    scores = dict(zip(sets, map_parallel(score, sets, nj), strict=True))
    means = {}
    for name, utterances in by_set(sets).items():
        means[name] = _summarise([scores[utterance] for utterance in utterances])
        for metric in ENHANCEMENT_METRICS:
            if failed := means[name][f"{metric}_failed"]:
                logging.warning(
                    "%s: %s is undefined for %d of %d utterances, which its mean leaves out",
                    *(name, metric, failed, len(utterances)),
                )
    rows: list[dict[str, str | float]] = [
        {"utterance": utterance, "set": sets[utterance], **row} for utterance, row in scores.items()
    ]
    return means, rows


def _summarise(scores: Sequence[Mapping[str, float]]) -> dict[str, float | int | None]:
    """Return a set's means and failures from the scores of its utterances."""
    summary: dict[str, float | int | None] = {}
    for metric in ENHANCEMENT_METRICS:
        values = [row[metric] for row in scores if metric in row]
        finite = [value for value in values if math.isfinite(value)]
        summary[metric] = float(np.mean(finite)) if finite else None
        summary[f"{metric}_failed"] = len(values) - len(finite) if values else None
    return summary | {"utterances": len(scores)}
