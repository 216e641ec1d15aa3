import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from posinv.errors import InputError
from posinv.scoring.query_search import (
    BETA,
    DISTANCES,
    frame_distances,
    max_term_weighted_value,
    normalise_dimensions,
    read_relevance,
    read_unsearched,
    score_search,
    search,
    subsequence_cost,
    term_weighted_value,
)


def frames(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_are_scipys(distance):
    query, document = frames(6, 16), frames(9, 16, seed=1)
    wanted = cdist(query, document, distance.removesuffix("_exp"))
    if distance == "cosine_exp":
        wanted = np.exp(wanted) - 1
    assert frame_distances(query, document, distance) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_every_dimension_is_normalised_over_all_frames():
    features = [frames(length, 4, seed=length) * [1, 2, 3, 0] + [5, 6, 7, 8] for length in (3, 1)]
    together = torch.cat([torch.from_numpy(x) for x in features])
    mean, std = together.mean(0), together.std(0).clamp(min=1e-9)
    normalised = normalise_dimensions(features)
    assert [x.shape for x in normalised] == [x.shape for x in features]
    assert np.concatenate(normalised) == pytest.approx(((together - mean) / std).numpy())


# -------------------------------------------------------------------------------- alignment


def cost_of_every_path(distances):
    """The least mean of all paths: a first frame of the document, then steps of 0, 1 or 2."""
    low, high = distances.min(axis=1, keepdims=True), distances.max(axis=1, keepdims=True)
    scaled = (distances - low) / np.maximum(high - low, 1e-9)
    n, m = distances.shape
    costs = []
    for first, *steps in itertools.product(range(m), *[range(3)] * (n - 1)):
        path = np.cumsum([first, *steps])
        if path[-1] < m:
            costs.append(sum(scaled[i, j] for i, j in enumerate(path)) / n)
    return min(costs)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_cost_is_the_least_of_all_paths(n, m, seed):
    distances = np.random.default_rng(seed).random((n, m))
    assert subsequence_cost(distances) == pytest.approx(cost_of_every_path(distances))


def test_cost_of_equal_distances_is_zero():
    assert subsequence_cost(np.full((3, 4), 0.7)) == 0


@pytest.mark.parametrize("speed", [0.5, 1, 2])
def test_a_query_is_found_at_half_and_double_speed(speed):
    query = np.repeat(frames(10, 8), 2, axis=0)
    played = np.repeat(query[::2], round(2 / speed), axis=0)
    with_it = np.concatenate([frames(7, 8, seed=1), played, frames(5, 8, seed=2)])
    without = frames(len(with_it), 8, seed=3)
    costs = [subsequence_cost(frame_distances(query, x)) for x in (with_it, without)]
    assert costs[0] < 1e-5 < 0.05 < costs[1]


# ----------------------------------------------------------------------------------- search


def test_scores_are_normalised_negative_costs():
    queries = [frames(5, 8, seed=1), frames(9, 8, seed=2)]
    documents = [frames(length, 8, seed=length) for length in (20, 1, 33, 4)]
    scores = search(queries, documents, "cosine")
    for query, row in zip(queries, scores, strict=True):
        costs = np.array([subsequence_cost(frame_distances(query, d, "cosine")) for d in documents])
        assert row == pytest.approx((costs.mean() - costs) / costs.std(), abs=1e-5)
    assert np.array_equal(search(queries, documents, "cosine", nj=2), scores)


def test_a_query_of_less_than_five_frames_is_not_searched():
    scores = search([frames(4, 8), frames(5, 8)], [frames(20, 8), frames(30, 8, seed=1)])
    assert not scores[0].any()
    assert scores[1].any()


# -------------------------------------------------------------------- term weighted value


def value_by_counting(scores, relevant, threshold, beta):
    losses = []
    for row, truth in zip(scores, relevant, strict=True):
        if not truth.any():
            continue
        misses = sum(t and s < threshold for s, t in zip(row, truth, strict=True))
        alarms = sum(not t and s >= threshold for s, t in zip(row, truth, strict=True))
        others = len(truth) - truth.sum()
        losses.append(misses / truth.sum() + (beta * alarms / others if others else 0))
    return 1 - sum(losses) / len(losses)


def test_beta_is_the_evaluations():
    # The effective prior that the README of the evaluation's scorer shows.
    effective_prior = 1 / (1 + BETA)
    assert effective_prior == pytest.approx(0.0741289, abs=1e-6)


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 1.0, BETA]),
    st.booleans(),
)
def test_maximum_is_that_of_all_thresholds(q, d, seed, beta, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (q, d)).astype(float) if ties else rng.standard_normal((q, d))
    scores[rng.random((q, d)) < 0.2] = -np.inf
    relevant = rng.random((q, d)) < 0.4
    relevant[0, 0] = True
    thresholds = [*np.unique(scores[scores > -np.inf]), np.inf]
    values = [value_by_counting(scores, relevant, t, beta) for t in thresholds]
    for threshold, value in zip(thresholds, values, strict=True):
        assert term_weighted_value(scores, relevant, threshold, beta) == pytest.approx(value)
    best = max_term_weighted_value(scores, relevant, beta)
    assert best.twv == pytest.approx(max(values))
    assert value_by_counting(scores, relevant, best.threshold, beta) == pytest.approx(best.twv)


def test_a_perfect_and_a_useless_search():
    relevant = np.array([[True, False, False], [False, True, True]])
    perfect = max_term_weighted_value(relevant.astype(float), relevant)
    assert (perfect.twv, perfect.threshold) == (pytest.approx(1), 1)
    useless = max_term_weighted_value(-relevant.astype(float), relevant)
    assert (useless.twv, useless.threshold) == (0, np.inf)


# -------------------------------------------------------------------- files, whole searches


def test_relevance(tmp_path):
    path = tmp_path / "relevance"
    path.write_text("b 1\na 2\n")
    assert np.array_equal(
        read_relevance(path, ["a", "b"], ["1", "2", "3"]),
        [[False, True, False], [True, False, False]],
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("a 1\na\n", "line 2: 'a': must be '<query> <document>'"),
        ("a 1 1\n", "line 1: 'a 1 1': must be"),
        ("c 1\n", "line 1: there is no query c"),
        ("a 9\n", "line 1: there is no document 9"),
        ("a 1\na 1\n", "line 2: a 1 is there twice"),
        (None, "No such file"),
    ],
)
def test_bad_relevance(tmp_path, text, message):
    path = tmp_path / "relevance"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        read_relevance(path, ["a", "b"], ["1", "2"])


def test_unsearched(tmp_path):
    path = tmp_path / "unsearched"
    path.write_text("a document\nb query\nc document\n")
    assert read_unsearched(path) == (["b"], ["a", "c"])
    assert read_unsearched(None) == ([], [])
    path.write_text("a dokument\n")
    with pytest.raises(InputError, match="a dokument: must be 'a query' or 'a document'"):
        read_unsearched(path)


@pytest.fixture
def task():
    """Three queries, two documents with each of them, in two sets."""
    queries = {f"q{k}": frames(12, 8, seed=k) for k in range(3)}
    documents, sets, pairs = {}, {}, []
    for s, k in itertools.product("xy", range(3)):
        name = f"{s}{k}"
        around = [frames(9 + k, 8, seed=10 + k), frames(6, 8, seed=ord(s))]
        documents[name] = np.concatenate([around[0], queries[f"q{k}"], around[1]])
        sets[name] = f"test_{s}"
        pairs.append(f"q{k} {name}\n")
    return queries, documents, sets, pairs


def test_each_set_is_searched(task, tmp_path):
    queries, documents, sets, pairs = task
    (tmp_path / "relevance").write_text("".join(pairs))
    results, rows = score_search(queries, documents, sets, tmp_path / "relevance")
    assert list(results) == ["test_x", "test_y"]
    for scores in results.values():
        assert scores["mtwv"] == pytest.approx(1)
        assert (scores["queries"], scores["documents"], scores["relevant"]) == (3, 3, 3)
        assert -3 < scores["threshold"] < 3
    assert len(rows) == 18
    assert {(q, d, s) for q, d, s, relevant, _ in rows if relevant} == {
        (f"q{k}", f"{s}{k}", f"test_{s}") for s in "xy" for k in range(3)
    }
    assert all(score > 1 for *_, relevant, score in rows if relevant)


def test_normalisation_is_over_the_set(task, tmp_path):
    queries, documents, sets, pairs = task
    (tmp_path / "relevance").write_text("".join(pairs))
    of_x = {name: x + 3 for name, x in documents.items() if name[0] == "x"}
    names = {name: sets[name] for name in of_x}
    (tmp_path / "of x").write_text("".join(line for line in pairs if "x" in line))
    _, rows = score_search(queries, documents | of_x, sets, tmp_path / "relevance")
    _, alone = score_search(queries, of_x, names, tmp_path / "of x")
    assert [row for row in rows if row[2] == "test_x"] == alone
    _, plain = score_search(queries, of_x, names, tmp_path / "of x", normalise=False)
    assert plain != alone
    wanted = search([*queries.values()], [*of_x.values()])
    assert [row[-1] for row in plain] == wanted.ravel().tolist()


def test_what_is_not_searched_counts_as_missed(task, tmp_path):
    """As with S3PRL's default score of -10, below all others."""
    queries, documents, sets, pairs = task
    sets = dict.fromkeys(sets, "all")
    lines = [*pairs, "other x0\n", "q0 far1\n"]
    (tmp_path / "relevance").write_text("".join(lines))
    (tmp_path / "unsearched").write_text("far1 document\nfar2 document\nother query\n")
    results, rows = score_search(
        queries, documents, sets, tmp_path / "relevance", tmp_path / "unsearched"
    )
    scores = np.full((4, 8), -10.0)
    for query, document, *_, score in rows:
        scores[int(query[1]), list(documents).index(document)] = score
    relevant = np.zeros((4, 8), dtype=bool)
    for line in pairs:
        query, document = line.split()
        relevant[int(query[1]), list(documents).index(document)] = True
    relevant[3, 0] = relevant[0, 6] = True
    values = [value_by_counting(scores, relevant, t, BETA) for t in np.unique(scores)]
    assert results["all"]["mtwv"] == pytest.approx(max(values))
    assert 0 < results["all"]["mtwv"] < 0.7
    assert (results["all"]["queries"], results["all"]["documents"]) == (4, 8)


def test_bad_searches(task, tmp_path):
    queries, documents, sets, pairs = task
    path = tmp_path / "relevance"
    path.write_text("".join(line for line in pairs if "x" in line))
    with pytest.raises(InputError, match="relevance: test_y: no query is in any document"):
        score_search(queries, documents, sets, path)
    with pytest.raises(InputError, match="no utterance y2"):
        score_search(queries, documents, {k: v for k, v in sets.items() if k != "y2"}, path)
    (tmp_path / "unsearched").write_text("x1 document\n")
    with pytest.raises(InputError, match="unsearched: names what is searched"):
        score_search(queries, documents, sets, path, tmp_path / "unsearched")
