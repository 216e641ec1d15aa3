"""Whether two systems differ: paired bootstrap over utterances or speakers, and over seeds."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from posinv.errors import InputError
from posinv.report.experiment import Experiment
from posinv.report.results import ERROR_RATES, METRICS, SHORT

RESAMPLES = 10_000
LEVEL = 0.95
MIN_SPEAKERS = 20  # with fewer, utterances are drawn
BASE = {"noisy", "enh", "base"}  # systems which no criterion or method has tuned


@dataclass(frozen=True)
class Difference:
    """The difference of two systems: of their error rates, or of a measure of enhanced speech.

    Attributes:
        task: ``pr`` or ``asr``, or a measure, one of :data:`~posinv.report.results.METRICS`.
        test_set: the test set, or the test sets over which a measure is averaged, ``A and B``.
        system: the system.
        reference: the system that it is compared with.
        value: the system's figure minus the reference's, each the mean over the seeds: error
            rates in percentage points, SI-SDR in dB, STOI from 0 to 1, PESQ and DNSMOS as MOS.
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
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def better(self) -> bool:
        """Whether the system is the better one: less errors, or more of a measure."""
        return self.value < 0 if self.task in ERROR_RATES else self.value > 0

    @property
    def measure(self) -> str:
        """What is compared, in short: ``PER``, ``SI-SDR (dB)``."""
        return METRICS[self.task][0] if self.task in METRICS else SHORT[self.task]

    def show(self, value: float) -> str:
        """Return a figure of the difference with its sign, to one digit more than in the tables."""
        decimals = METRICS[self.task][1] if self.task in METRICS else 1
        return f"{value:+.{decimals + 1}f}"

    @property
    def interval(self) -> str:
        """The interval, ``<low> to <high>``; ``none`` if there is none."""
        return (
            "none" if math.isnan(self.low) else f"{self.show(self.low)} to {self.show(self.high)}"
        )


def paired_bootstrap(
    errors: np.ndarray,
    reference: np.ndarray,
    tokens: np.ndarray,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    scale: float = 100.0,
) -> tuple[float, float, float]:
    """Return the difference of two corpus error rates in %, and its 95 % interval.

    With the values of a measure, times weights, in place of errors, and these weights in place of
    tokens, it is that of two weighted means; ``scale`` is 1 then.

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
        scale: what an error a token counts: 100 for an error rate in %.

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
    difference = scale * change.mean(axis=0).sum() / tokens.sum()
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
            rates.append(scale * errors_more / (drawn @ tokens))
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
    """Compare all pairs of :func:`compared_pairs`.

    Args:
        experiment: the experiment; a pair is left out where ``scores.tsv`` of either is missing.
        sets: test sets by task (``pr``, ``asr``), each compared by itself, and by measure of
            enhanced speech, compared in the mean over its sets; None: all that have error rates,
            and those over which a table averages the measures.

    Raises:
        InputError: the two systems of a pair were scored on other transcripts or utterances.
    """
    if sets is None:
        sets = dict.fromkeys(ERROR_RATES, experiment.sets)
        sets |= dict.fromkeys(METRICS, experiment.enh_sets)
    pairs = [
        ((experiment, system), (experiment, reference))
        for system, reference in compared_pairs(experiment.systems)
    ]
    found = [
        compare(task, name, *pair)
        for task in ERROR_RATES
        for name in sets.get(task, ())
        for pair in pairs
    ]
    found += [
        compare_measures(metric, sets.get(metric, ()), *pair)
        for metric in METRICS
        for pair in pairs
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
    for seed in _common_seeds(one, other):
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
                path = experiment.decoded(seed, system, task) / "scores.tsv"
                raise _other_utterances(path, name, system, one, other)
        errors.append([[table[utterance].errors for utterance in known] for table in tables])
        seeds.append(seed)
    if not seeds:
        return None
    groups, unit = _units(one[0], [(name, utterance) for utterance in known])
    counts = np.array(errors)
    tokens = np.array([number for number, _ in known.values()])
    ends = paired_bootstrap(counts[:, 0], counts[:, 1], tokens, groups)
    return Difference(task, name, one[1], other[1], *ends, unit, len(set(groups)), tuple(seeds))


def compare_measures(
    metric: str, sets: Sequence[str], one: tuple[Experiment, str], other: tuple[Experiment, str]
) -> Difference | None:
    """Compare a measure of the enhanced speech of two systems, over the seeds that both have.

    Compared are the means over test sets, each the mean over its utterances, as a table shows
    them. The versions of an utterance in several test sets, ``<utterance>-<condition>``, are drawn
    together. Utterances for which the measure is undefined in either system are left out.

    Args:
        metric: one of :data:`~posinv.report.results.METRICS`.
        sets: the test sets.
        one: the system, with its experiment.
        other: the system that it is compared with, with its experiment.

    Returns:
        The difference; None if there is no seed in which all sets have the measure of both.

    Raises:
        InputError: the two were scored on other utterances.
    """
    of_seeds, seeds = [], []
    known: list[tuple[str, str]] = []
    for seed in _common_seeds(one, other):
        tables = []
        for experiment, system in (one, other):
            scored = experiment.measures(seed, system)
            tables.append({(n, u): row for n in sets for u, row in scored.get(n, {}).items()})
        have = [{name for (name, _), row in table.items() if metric in row} for table in tables]
        if any(names < set(sets) for names in have):
            continue
        for table, (experiment, system) in zip(tables, (one, other), strict=True):
            known = known or [*table]
            if table.keys() != set(known):
                path = experiment.enhanced(seed, system).with_suffix(".tsv")
                raise _other_utterances(path, " and ".join(sets), system, one, other)
        of_seeds.append([[table[key].get(metric, np.nan) for key in known] for table in tables])
        seeds.append(seed)
    if not seeds or not sets:
        return None
    values = np.array(of_seeds)  # (S, 2, U)
    defined = np.isfinite(values).all(axis=(0, 1))
    keys = [key for key, is_defined in zip(known, defined, strict=True) if is_defined]
    sizes = Counter(name for name, _ in keys)
    if sizes.keys() < set(sets):
        return None
    weights = np.array([1 / sizes[name] for name, _ in keys])
    weighted = values[:, :, defined] * weights
    groups, unit = _units(one[0], keys)
    ends = paired_bootstrap(weighted[:, 0], weighted[:, 1], weights, groups, scale=1)
    over, units = " and ".join(sets), len(set(groups))
    return Difference(metric, over, one[1], other[1], *ends, unit, units, tuple(seeds))


def _common_seeds(one: tuple[Experiment, str], other: tuple[Experiment, str]) -> list[str]:
    return [seed for seed in one[0].seeds if seed in other[0].seeds]


def _other_utterances(
    path: Path, name: str, system: str, one: tuple[Experiment, str], other: tuple[Experiment, str]
) -> InputError:
    first = one if system == other[1] else other
    return InputError(
        f"{path}: set {name}: other utterances or references than those of {first[1]}: "
        "score both again"
    )


def _units(experiment: Experiment, keys: Sequence[tuple[str, str]]) -> tuple[list[str], str]:
    """Return the unit that each (test set, utterance) is drawn with, and what units are."""
    speakers = {name: experiment.speakers(name) for name in dict.fromkeys(name for name, _ in keys)}
    if all(utterance in speakers[name] for name, utterance in keys):
        groups = [speakers[name][utterance] for name, utterance in keys]
        if len(set(groups)) >= MIN_SPEAKERS:
            return groups, "speakers"
    return [u.removesuffix(f"-{name.rpartition('_')[2]}") for name, u in keys], "utterances"


MARKS = {"enh": "*", "base": "*", "ssl_mse": "\N{DAGGER}", "noisy": "\N{DOUBLE DAGGER}"}


def marks(found: Sequence[Difference]) -> dict[tuple[str, str, str], str]:
    """Return the marks of a table's cells by (task, test set, system): see :func:`legend`."""
    cells: dict[tuple[str, str, str], str] = {}
    for one in found:
        if one.significant:
            key = one.task, one.test_set, one.system
            cells[key] = cells.get(key, "") + MARKS[one.reference]
    return cells


def about(found: Sequence[Difference], task: str, test_set: str, system: str) -> str:
    """Return the text that explains a table's cell: each difference with its interval."""
    return "; ".join(
        f"{one.show(one.value)} ({one.interval}) against {one.reference}"
        for one in found
        if (one.task, one.test_set, one.system) == (task, test_set, system)
    )


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
        else " of one random seed, so it does not cover the variation of another training"
    )
    *others, last = dict.fromkeys(one.measure.partition(" (")[0] for one in found)
    measures = f"{', '.join(others)} and {last}" if others else last
    return (
        f"Differs in {measures}: {explained}. A mark means that the 95 % interval of the "
        f"difference excludes 0 (paired bootstrap over {number} {unit}{trust}; no correction for "
        "the number of comparisons)."
    )
