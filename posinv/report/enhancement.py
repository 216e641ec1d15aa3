"""The tables of a speech enhancement recipe."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from posinv.report.results import (
    ERROR_RATES,
    NONE_PUBLISHED,
    Published,
    aggregate,
    error_rate_cells,
    markdown_table,
    read_scores,
    scores_of_seeds,
    search_table,
    seeds_caption,
)

METRICS = {"si_sdr": ("SI-SDR (dB)", 1), "stoi": ("STOI", 3), "pesq": ("PESQ", 2)}


def enhancement_report(
    expdir: Path | str,
    systems: Mapping[str, str],
    sets: Sequence[str],
    enh_sets: Sequence[str],
    seeds: Sequence[str],
    published: Published = NONE_PUBLISHED,
    qbe_sets: Sequence[str] = (),
) -> str:
    """Return the tables of a speech enhancement recipe: PER, WER, and SI-SDR, STOI and PESQ.

    Args:
        expdir: folder with ``seed<seed>/<system>/superb/{pr,asr}/best/decode/scores.json`` and
            ``seed<seed>/<system>/enhanced/scores.json``; with ``qbe_sets``, also
            ``seed<seed>/<system>/qbe/scores.json``.
        systems: the row's label for each system.
        sets: test sets of PER and WER.
        enh_sets: test sets over which SI-SDR, STOI and PESQ are averaged.
        seeds: random seeds.
        published: published figures, for columns beside ours.
        qbe_sets: test sets of a further table, of query-by-example search; none: no such table.

    Returns:
        Markdown.

    Raises:
        InputError: a score is missing. PESQ may be null: it wasn't computed then.
    """
    over = seeds_caption(seeds)
    parts = []
    for task, caption in ERROR_RATES.items():
        rows = [
            [
                label,
                *published.beside(
                    error_rate_cells(expdir, seeds, system, task, sets), task, sets, system
                ),
            ]
            for system, label in systems.items()
        ]
        header = ["system", *published.beside(sets, task, sets)]
        parts.append(f"{caption}, {over}:\n\n{markdown_table(header, rows)}")
    if qbe_sets:
        parts.append(search_table(expdir, systems, qbe_sets, seeds, published, "system"))
    if sources := published.sources():
        parts.append(sources)

    rows, notes = [], []
    metrics = [*METRICS, *map(_failed, METRICS), "utterances"]
    for system, label in systems.items():
        row = [label]
        of_seeds = [
            list(read_scores(path, enh_sets, metrics).values())
            for path in scores_of_seeds(expdir, seeds, system, "enhanced")
        ]
        for metric, (name, decimals) in METRICS.items():
            means = [_mean([scores[metric] for scores in of_sets]) for of_sets in of_seeds]
            row.append(aggregate(means, decimals))
            every = [scores for of_sets in of_seeds for scores in of_sets]
            if failed := sum(scores[_failed(metric)] or 0 for scores in every):
                total = sum(scores["utterances"] or 0 for scores in every)
                notes.append(f"{name} of {label}: {failed} of {total}")
        rows.append(row)
    header = ["system", *(name for name, _ in METRICS.values())]
    table = markdown_table(header, rows)
    parts.append(f"Enhancement, mean of {' and '.join(enh_sets)}, {over}:\n\n{table}")
    if notes:
        parts.append(f"Utterances left out, as their score is undefined: {'; '.join(notes)}.\n")
    return "\n".join(parts)


def _failed(metric: str) -> str:
    return f"{metric}_failed"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
