"""Whether two systems differ: paired bootstrap over utterances or speakers, and over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from posinv.errors import InputError
from posinv.report.experiment import Experiment
from posinv.report.results import ERROR_RATES, SHORT

RESAMPLES = 10_000
LEVEL = 0.95
MIN_SPEAKERS = 20  # with fewer, utterances are drawn
BASE = {"noisy", "enh", "base"}  # systems which no criterion or method has tuned


@dataclass(frozen=True)
class Difference:
    """The difference of two systems' error rates in one test set, in percentage points.

    Attributes:
        task: ``pr`` or ``asr``.
        test_set: the test set.
        system: the system.
        reference: the system that it is compared with.
        value: the system's error rate minus the reference's, each the mean over the seeds.
        low: lower end of the 95 % interval; NaN if there is only one unit to draw from.
        high: its upper end.
        unit: what was drawn, ``utterances`` or ``speakers``.
        units: how many there are.
        seeds: the random seeds that both systems have.
    """

    task: str
    test_set: str
    system: str
    reference: str
    value: float
    low: float
    high: float
    unit: str
    units: int
    seeds: tuple[str, ...]

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    errors: np.ndarray,
    reference: np.ndarray,
    tokens: np.ndarray,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the difference of two corpus error rates in %, and its 95 % interval.

    M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation", ICASSP 2004: utterances are drawn with replacement, the same ones for both
    systems, and the interval is that of the percentiles. With several random seeds, these are
    drawn with replacement, too, since what a training draws moves an error rate as well.

    Args:
        errors: (S, U) errors of each of S seeds in each of U utterances.
        reference: (S, U) those of the system to compare with.
        tokens: (U,) reference tokens.
        groups: U names, such as speakers; utterances of one name are drawn together. None: each
            utterance is drawn by itself.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The difference, and the ends of the interval. These are NaN if there is one utterance (or
        group) only.
    """
    change = (np.asarray(errors) - np.asarray(reference)).astype(np.float64)
    tokens = np.asarray(tokens, dtype=np.float64)
    if groups is not None:
        _, members = np.unique(np.asarray(groups), return_inverse=True)
        change = np.stack([np.bincount(members, row) for row in change])
        tokens = np.bincount(members, tokens)
    difference = 100 * change.mean(axis=0).sum() / tokens.sum()
    seeds, units = change.shape
    if units < 2:
        return float(difference), np.nan, np.nan
    of_units, of_seeds = _draws(units, resamples, seed), _draws(seeds, resamples, seed + 1)
    rates = []
    for start in range(0, resamples, 1000):
        drawn = of_units[start : start + 1000].astype(np.float64)
        weights = of_seeds[start : start + 1000] / seeds
        with np.errstate(invalid="ignore", divide="ignore"):
            errors_more = np.einsum("rs,rs->r", drawn @ change.T, weights)
            rates.append(100 * errors_more / (drawn @ tokens))
    tail = (1 - LEVEL) / 2
    # A draw of utterances without a reference token has no rate.
    low, high = np.nanquantile(np.concatenate(rates), [tail, 1 - tail])
    return float(difference), float(low), float(high)


@lru_cache(maxsize=4)  # the same for all comparisons of a table
def _draws(units: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each unit is drawn, (resamples, units) of uint16."""
    generator = np.random.default_rng(seed)
    drawn = np.empty((resamples, units), np.uint16)
    for row in drawn:
        row[:] = np.bincount(generator.integers(units, size=units), minlength=units)
    return drawn


def compared_pairs(systems: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs (system, reference) that a table of these systems invites to compare.

    A criterion is compared with the model before it and with ``ssl_mse``, a method with its base,
    the enhancement model before fine-tuning with the noisy input.
    """
    pairs = [("enh", "noisy")]
    for system in systems:
        if system not in BASE:
            pairs += [(system, other) for other in ("enh", "ssl_mse", "base") if other != system]
    return [pair for pair in pairs if set(pair) <= set(systems)]


def differences(
    experiment: Experiment, sets: Mapping[str, Sequence[str]] | None = None
) -> list[Difference]:
    """Compare the error rates of all pairs of :func:`compared_pairs`, in each test set.

    Args:
        experiment: the experiment; a pair is left out where ``scores.tsv`` of either is missing.
        sets: test sets by task (``pr``, ``asr``); None: all.

    Raises:
        InputError: the two systems of a pair were scored on other transcripts.
    """
    found = [
        compare(task, name, (experiment, system), (experiment, reference))
        for task in ERROR_RATES
        for name in (experiment.sets if sets is None else sets.get(task, ()))
        for system, reference in compared_pairs(experiment.systems)
    ]
    return [one for one in found if one is not None]


def compare(
    task: str, name: str, one: tuple[Experiment, str], other: tuple[Experiment, str]
) -> Difference | None:
    """Compare the error rates of two systems, over the seeds that both have.

    Args:
        task: ``pr`` or ``asr``.
        name: the test set.
        one: the system, with its experiment.
        other: the system that it is compared with, with its experiment.

    Returns:
        The difference; None if there is no seed with the ``scores.tsv`` of both.

    Raises:
        InputError: the two were scored on other transcripts.
    """
    errors, seeds = [], []
    known: dict[str, tuple[int, str]] = {}
    for seed in (seed for seed in one[0].seeds if seed in other[0].seeds):
        tables = []
        for experiment, system in (one, other):
            scored = experiment.utterances(seed, system, task).get(name, ())
            tables.append({utterance.name: utterance for utterance in scored})
        if not all(tables):
            continue
        for table, (experiment, system) in zip(tables, (one, other), strict=True):
            texts = {utterance: (row.ref_tokens, row.ref) for utterance, row in table.items()}
            known = known or texts
            if texts != known:
                first = one if system == other[1] else other
                raise InputError(
                    f"{experiment.decoded(seed, system, task)}/scores.tsv: set {name}: other "
                    f"utterances or references than those of {first[1]}: score both again"
                )
        errors.append([[table[utterance].errors for utterance in known] for table in tables])
        seeds.append(seed)
    if not seeds:
        return None
    speakers = one[0].speakers(name)
    groups, unit = None, "utterances"
    if speakers.keys() >= known.keys():
        of_utterances = [speakers[utterance] for utterance in known]
        if len(set(of_utterances)) >= MIN_SPEAKERS:
            groups, unit = of_utterances, "speakers"
    counts = np.array(errors)
    tokens = np.array([number for number, _ in known.values()])
    value, low, high = paired_bootstrap(counts[:, 0], counts[:, 1], tokens, groups)
    units = len(known) if groups is None else len(set(groups))
    return Difference(task, name, one[1], other[1], value, low, high, unit, units, tuple(seeds))


MARKS = {"enh": "*", "base": "*", "ssl_mse": "\N{DAGGER}", "noisy": "\N{DOUBLE DAGGER}"}


def marks(found: Sequence[Difference]) -> dict[tuple[str, str, str], str]:
    """Return the marks of a table's cells by (task, test set, system): see :func:`legend`."""
    cells: dict[tuple[str, str, str], str] = {}
    for one in found:
        if one.significant:
            key = one.task, one.test_set, one.system
            cells[key] = cells.get(key, "") + MARKS[one.reference]
    return cells


def legend(found: Sequence[Difference], labels: Mapping[str, str]) -> str:
    """Return the sentences that explain the marks, as one paragraph; empty if nothing is compared.

    Args:
        found: the comparisons.
        labels: the row's label for each system.
    """
    if not found:
        return ""
    references = dict.fromkeys(one.reference for one in found)
    explained = ", ".join(f"{MARKS[name]} from {labels.get(name, name)}" for name in references)
    units = sorted({one.units for one in found})
    number = str(units[0]) if len(units) == 1 else f"{units[0]} to {units[-1]}"
    unit = " or ".join(sorted({one.unit for one in found}))
    seeds = max((one.seeds for one in found), key=len)
    trust = (
        f" and the {len(seeds)} seeds"
        if len(seeds) > 1
        else " of one seed, which says nothing of another training"
    )
    rates = " and ".join(dict.fromkeys(SHORT[one.task] for one in found))
    return (
        f"Differs in {rates}: {explained}. A mark means that the 95 % interval of the difference "
        f"leaves out 0 (paired bootstrap over {number} {unit}{trust}; not corrected for the "
        "number of comparisons)."
    )
