"""The tables of a speech enhancement recipe."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from posinv.report.error_rates import error_rate_table, search_table
from posinv.report.experiment import Experiment
from posinv.report.results import (
    ERROR_RATES,
    METRICS,
    NONE_PUBLISHED,
    Published,
    seeds_caption,
)
from posinv.report.significance import Difference, about, differences, legend, marks
from posinv.report.tables import Cell, Column, ScoreReader, Table, figure


def enhancement_report(
    expdir: Path | str,
    systems: Mapping[str, str],
    sets: Sequence[str],
    enh_sets: Sequence[str],
    seeds: Sequence[str],
    published: Published = NONE_PUBLISHED,
    qbe_sets: Sequence[str] = (),
) -> str:
    """Return the tables of a speech enhancement recipe: error rates and signal measures.

    Args:
        expdir: folder with ``seed<seed>/<system>/superb/{pr,asr}/best/decode/scores.json`` and
            ``seed<seed>/<system>/enhanced/scores.json``; with ``qbe_sets``, also
            ``seed<seed>/<system>/qbe/scores.json``. Where ``scores.tsv`` is beside the scores of
            the heads and of enhanced speech, the tables have marks of significance.
        systems: the row's label for each system.
        sets: test sets of PER and WER.
        enh_sets: test sets over which SI-SDR, STOI, PESQ and DNSMOS are averaged.
        seeds: random seeds.
        published: published figures, for columns beside ours.
        qbe_sets: test sets of a further table, of query-by-example search; none: no such table.

    Returns:
        Markdown.

    Raises:
        InputError: a score is missing. PESQ and DNSMOS may be null: they weren't computed then.
    """
    experiment = Experiment(Path(expdir), tuple(systems), tuple(seeds))
    compared = dict.fromkeys(ERROR_RATES, sets) | dict.fromkeys(METRICS, enh_sets)
    found = differences(experiment, compared)
    tables = enhancement_tables(
        experiment, systems, sets, enh_sets, ScoreReader(), published, qbe_sets, found
    )
    return "\n".join(table.markdown() for table in tables)


def enhancement_tables(
    experiment: Experiment,
    labels: Mapping[str, str],
    sets: Sequence[str],
    enh_sets: Sequence[str],
    read: ScoreReader,
    published: Published,
    qbe_sets: Sequence[str],
    found: Sequence[Difference],
) -> list[Table]:
    """Return the tables of :func:`enhancement_report`, with the marks of the comparisons found."""
    tables = [
        error_rate_table(experiment, labels, task, sets, read, published, found)
        for task in ERROR_RATES
    ]
    tables[-1].notes.append(legend([one for one in found if one.task in ERROR_RATES], labels))
    if qbe_sets:
        tables.append(search_table(experiment, labels, qbe_sets, read, published, "system"))
    tables[-1].notes.append(published.sources())
    if enh_sets:
        tables.append(_signal_table(experiment, labels, enh_sets, read, found))
    return tables


def _signal_table(
    experiment: Experiment,
    labels: Mapping[str, str],
    sets: Sequence[str],
    read: ScoreReader,
    found: Sequence[Difference],
) -> Table:
    found = [one for one in found if one.task in METRICS]
    over, signs = " and ".join(sets), marks(found)
    rows, notes = [], []
    metrics = [*METRICS, *map(_failed, METRICS), "utterances"]
    for system, label in labels.items():
        row = [Cell(label)]
        of_seeds = [
            list(read(experiment.enhanced(seed, system), sets, metrics).values())
            for seed in experiment.seeds
        ]
        for metric, (name, decimals) in METRICS.items():
            means = [_mean([scores[metric] for scores in of_sets]) for of_sets in of_seeds]
            signed = signs.get((metric, over, system), "")
            row.append(figure(means, decimals, signed, about(found, metric, over, system)))
            every = [scores for of_sets in of_seeds for scores in of_sets]
            if failed := sum(scores[_failed(metric)] or 0 for scores in every):
                total = sum(scores["utterances"] or 0 for scores in every)
                notes.append(f"{name} of {label}: {failed} of {total}")
        rows.append(row)
    table = Table(
        "Enhancement",
        f"Enhancement, mean of {over}, {seeds_caption(experiment.seeds)}",
        [Column("system"), *(Column(name, "high") for name, _ in METRICS.values())],
        rows,
        [legend(found, labels)],
    )
    if notes:
        table.notes.append(f"Utterances left out, as their score is undefined: {'; '.join(notes)}.")
    return table


def _failed(metric: str) -> str:
    return f"{metric}_failed"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
