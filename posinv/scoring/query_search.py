"""Query by example: spoken queries searched in spoken documents, and the search's MTWV.

The search is that of S3PRL's ``quesst14_dtw``, SUPERB's task QbE (arXiv 2105.01051): subsequence
DTW on the frames of one layer of an SSL model, without training. The maximum term weighted value
(MTWV) is that of MediaEval's evaluation QUESST 2014 (X. Anguera et al., *QUESST2014: Evaluating
query-by-example speech search in a zero-resource setting with real-life queries*, ICASSP 2015).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import librosa
import numpy as np
from sklearn.metrics import pairwise_distances

from posinv.data.parallel import map_parallel
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.scoring.text import by_set, require_same_ids

Distance = Literal["cosine_exp", "cosine", "euclidean", "cityblock"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)

MIN_FRAMES = 5  # a shorter query isn't searched: all documents get score 0
DECISION = 2.0  # S3PRL's threshold of a detection, in standard deviations

# From score-TWV-Cnxe.sh of QUESST 2015's scoring package (2014's was not to be seen): P_target,
# C_fa, C_miss. The README beside it prints what follows from them, an effective prior of 0.0741.
P_TARGET, C_FA, C_MISS = 0.0008, 1.0, 100.0
BETA = C_FA / C_MISS * (1 - P_TARGET) / P_TARGET  # 12.49

# dtw-python's "asymmetric": one frame of the query on, and none, one or two of the document.
_STEPS = np.array([[1, 0], [1, 1], [1, 2]], dtype=np.uint32)
_TINY = 1e-9


def normalise_dimensions(features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Bring each dimension to mean 0 and variance 1 over the frames of all sequences.

    Args:
        features: sequences ``(N_k, D)``, with two frames at least in all.

    Returns:
        The normalised sequences. A constant dimension is zero.
    """
    frames = np.concatenate(features)
    mean = frames.mean(axis=0, dtype=np.float64)
    deviation = np.maximum(frames.std(axis=0, ddof=1, dtype=np.float64), _TINY)
    return [((x - mean) / deviation).astype(x.dtype) for x in features]


def frame_distances(
    query: np.ndarray, document: np.ndarray, distance: Distance = "cosine_exp"
) -> np.ndarray:
    """Distances of all frames of a query ``(N, D)`` and a document ``(M, D)``.

    Args:
        query: frames of the query.
        document: frames of the document.
        distance: ``cosine`` is one minus the cosine, ``cosine_exp`` is ``exp(cosine) - 1`` of that
            distance, ``euclidean`` and ``cityblock`` are the L2 and L1 norms of the difference.

    Returns:
        ``(N, M)``, not negative.
    """
    if distance in ("euclidean", "cityblock"):
        return pairwise_distances(query, document, metric=distance)
    # A third of the time that pairwise_distances takes.
    cosine = np.maximum(1 - _unit_frames(query) @ _unit_frames(document).T, 0)
    return cosine if distance == "cosine" else np.expm1(cosine)


def _unit_frames(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _TINY)


def subsequence_cost(distances: np.ndarray) -> float:
    """Cost a query frame of the best alignment of a whole query with a part of a document.

    Each query frame's distances are first brought to the range from 0 to 1. The alignment may
    begin and end at any frame of the document. With each frame of the query, it goes on by none,
    one or two frames of the document (dtw-python's step pattern ``asymmetric``, open at both ends).

    Args:
        distances: of the frames, ``(N, M)``.

    Returns:
        The sum of the alignment's distances, divided by N: from 0 to 1.
    """
    distances = distances.astype(np.float64)
    low = distances.min(axis=1, keepdims=True)
    span = np.maximum(distances.max(axis=1, keepdims=True) - low, _TINY)
    accumulated = librosa.sequence.dtw(
        C=(distances - low) / span, step_sizes_sigma=_STEPS, subseq=True, backtrack=False
    )
    return accumulated[-1].min() / len(distances)


def search(
    queries: Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    distance: Distance = "cosine_exp",
    nj: int = 1,
) -> np.ndarray:
    """Score each pair of a query and a document: the higher, the surer that the query is in it.

    The score is the negative :func:`subsequence_cost`, brought to mean 0 and standard deviation 1
    over the documents of each query. A query of less than 5 frames has score 0 for all documents.

    Args:
        queries: the queries' frames, ``(N, D)`` each.
        documents: the documents' frames, ``(M, D)`` each.
        distance: see :func:`frame_distances`.
        nj: number of processes.

    Returns:
        Scores ``(Q, D)`` of Q queries and D documents.
    """

    def costs(query: np.ndarray) -> list[float]:
        if len(query) < MIN_FRAMES:
            return [0.0] * len(documents)
        return [subsequence_cost(frame_distances(query, x, distance)) for x in documents]

    scores = -np.array(list(map_parallel(costs, queries, nj)))
    scores -= scores.mean(axis=1, keepdims=True)
    return scores / np.maximum(scores.std(axis=1, keepdims=True), _TINY)


@dataclass(frozen=True)
class Operation:
    """A threshold of detection, and the term weighted value (TWV) there."""

    twv: float
    threshold: float


def term_weighted_value(
    scores: np.ndarray, relevant: np.ndarray, threshold: float, beta: float = BETA
) -> float:
    """Term weighted value: 1 - the queries' mean of ``P_miss + beta P_fa``.

    ``P_miss`` is the share of a query's relevant documents that score below the threshold,
    ``P_fa`` the share of the other documents that don't. Queries without any relevant document are
    left out, as the evaluation's scorer does.

    Args:
        scores: ``(Q, D)``; minus infinity where a pair wasn't searched.
        relevant: ``(Q, D)`` bool, whether the query is in the document.
        threshold: of detection.
        beta: cost of false alarms relative to misses.

    Returns:
        The value, at most 1; 0 if nothing is detected.

    Raises:
        InputError: no query has a relevant document.
    """
    return float(_gains(relevant, beta)[scores >= threshold].sum())


def max_term_weighted_value(
    scores: np.ndarray, relevant: np.ndarray, beta: float = BETA
) -> Operation:
    """Maximum term weighted value (MTWV): :func:`term_weighted_value` at the best threshold.

    Args:
        scores, relevant, beta: see :func:`term_weighted_value`.

    Returns:
        The maximum, and the highest score at which it is reached: 0 and infinity if it is best to
        detect nothing.

    Raises:
        InputError: no query has a relevant document.
    """
    gains = _gains(relevant, beta)
    searched = scores > -np.inf
    scores, gains = scores[searched], gains[searched]
    order = np.argsort(-scores)
    scores, values = scores[order], np.cumsum(gains[order])
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True)[: len(scores)])
    best = ends[np.argmax(values[ends])] if len(ends) else None
    if best is None or values[best] <= 0:
        return Operation(0.0, math.inf)
    return Operation(float(values[best]), float(scores[best]))


def _gains(relevant: np.ndarray, beta: float) -> np.ndarray:
    """(Q, D), what the detection of each pair adds to the term weighted value."""
    hits = relevant.sum(axis=1, keepdims=True)
    counted = hits > 0
    if not counted.any():
        raise InputError("no query is in any document: correct the relevance file")
    others = relevant.shape[1] - hits
    gains = np.where(relevant, 1 / np.maximum(hits, 1), -beta / np.maximum(others, 1))
    return gains * counted / counted.sum()


def read_relevance(
    path: Path | str, queries: Sequence[str], documents: Sequence[str]
) -> np.ndarray:
    """Read the file of relevant pairs: each line is ``<query> <document>``.

    Args:
        path: the file, in any order.
        queries: ids of all queries.
        documents: ids of all documents.

    Returns:
        ``(Q, D)`` bool.

    Raises:
        InputError: no such file; a line of another form, or with an unknown id; a pair twice.
    """
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (queries, documents))
    relevant = np.zeros((len(rows), len(columns)), dtype=bool)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            query, document = line.split()
        except ValueError:
            raise InputError(f"{where}: '{line}': must be '<query> <document>'") from None
        for name, known, kind in ((query, rows, "query"), (document, columns, "document")):
            if name not in known:
                raise InputError(f"{where}: there is no {kind} {name}: correct it, or the lists")
        if relevant[rows[query], columns[document]]:
            raise InputError(f"{where}: {query} {document} is there twice: remove one")
        relevant[rows[query], columns[document]] = True
    return relevant


def read_unsearched(path: Path | str | None) -> tuple[list[str], list[str]]:
    """Read the queries and documents of an evaluation that aren't searched; None: there are none.

    S3PRL searches the English part of QUESST 2014 alone, and is scored on the whole of it.

    Args:
        path: lines ``<id> query`` or ``<id> document``, sorted by id.

    Returns:
        The ids of queries, and those of documents.

    Raises:
        InputError: as :func:`posinv.data.tables.read_table`; something else after an id.
    """
    table = read_table(path) if path else {}
    for name, kind in table.items():
        if kind not in ("query", "document"):
            raise InputError(f"{path}: {name} {kind}: must be '{name} query' or '{name} document'")
    kinds = ([name for name in table if table[name] == kind] for kind in ("query", "document"))
    return next(kinds), next(kinds)


def score_search(
    queries: Mapping[str, np.ndarray],
    documents: Mapping[str, np.ndarray],
    sets: Mapping[str, str],
    relevance: Path | str,
    unsearched: Path | str | None = None,
    distance: Distance = "cosine_exp",
    normalise: bool = True,
    nj: int = 1,
) -> tuple[dict[str, dict[str, float | int | None]], list[tuple[str, str, str, bool, float]]]:
    """Search queries in the documents of each set, and compute the term weighted values.

    Args:
        queries: the queries' frames, ``(N, D)``, by id.
        documents: the documents' frames, ``(M, D)``, by id.
        sets: the set of each document.
        relevance: file of relevant pairs, see :func:`read_relevance`.
        unsearched: file of what counts as not found, see :func:`read_unsearched`.
        distance: see :func:`frame_distances`.
        normalise: :func:`normalise_dimensions` over all queries and the set's documents.
        nj: number of processes.

    Returns:
        The scores of each set, and a row ``(query, document, set, relevant, score)`` for each pair
        searched. A set has ``mtwv`` and its ``threshold`` (None if it is best to detect nothing);
        ``atwv``, the value at S3PRL's threshold of 2; and the numbers of ``queries`` that are in a
        document, of ``documents`` and of ``relevant`` pairs.

    Raises:
        InputError: ids that don't match; a bad file; a set without any relevant document.
    """
    require_same_ids(documents, sets, "the documents", "the sets")
    absent_queries, absent_documents = read_unsearched(unsearched)
    all_queries, all_documents = [*queries, *absent_queries], [*documents, *absent_documents]
    if len({*all_queries}) < len(all_queries) or len({*all_documents}) < len(all_documents):
        raise InputError(f"{unsearched}: names what is searched: take it out, or correct the lists")
    relevant = read_relevance(relevance, all_queries, all_documents)
    column = {name: i for i, name in enumerate(all_documents)}
    results: dict[str, dict[str, float | int | None]] = {}
    rows = []
    for name, ids in by_set(sets).items():
        features = [*queries.values(), *(documents[i] for i in ids)]
        if normalise:
            features = normalise_dimensions(features)
        scores = search(features[: len(queries)], features[len(queries) :], distance, nj)
        truth = relevant[:, [column[i] for i in (*ids, *absent_documents)]]
        trials = np.full(truth.shape, -np.inf)
        trials[: len(queries), : len(ids)] = scores
        try:
            best = max_term_weighted_value(trials, truth)
        except InputError as error:
            raise InputError(f"{relevance}: {name}: {error}") from error
        results[name] = {
            "mtwv": best.twv,
            "threshold": best.threshold if math.isfinite(best.threshold) else None,
            "atwv": term_weighted_value(trials, truth, DECISION),
            "queries": int(truth.any(axis=1).sum()),
            "documents": truth.shape[1],
            "relevant": int(truth.sum()),
        }
        rows += [
            (query, document, name, bool(truth[q, d]), float(scores[q, d]))
            for q, query in enumerate(queries)
            for d, document in enumerate(ids)
        ]
    return results, rows
