import itertools
import math

import numpy as np
import pytest
import scipy.stats

from posinv.errors import InputError
from posinv.report.experiment import Experiment
from posinv.report.significance import (
    compared_pairs,
    differences,
    legend,
    marks,
    paired_bootstrap,
)


def exact_interval(errors, reference, tokens):
    """The percentiles over every draw of seeds and utterances that there is."""
    seeds, units = errors.shape
    rates = [
        100
        * np.mean([(errors[s, list(us)] - reference[s, list(us)]).sum() for s in chosen])
        / tokens[list(us)].sum()
        for chosen in itertools.product(range(seeds), repeat=seeds)
        for us in itertools.product(range(units), repeat=units)
    ]
    return np.quantile(rates, [0.025, 0.975])


@pytest.mark.parametrize(("seeds", "units"), [(1, 5), (2, 4), (3, 4)])
def test_against_all_draws(seeds, units):
    random = np.random.default_rng(seeds)
    # Real-valued, so that the percentiles do not jump between a few values.
    errors, reference = random.random((2, seeds, units)) * 4
    tokens = random.integers(3, 9, units)
    value, low, high = paired_bootstrap(errors, reference, tokens, resamples=200_000)
    plain = [100 * x.sum() / (seeds * tokens.sum()) for x in (errors, reference)]
    assert value == pytest.approx(plain[0] - plain[1])
    expected = exact_interval(errors, reference, tokens)
    assert [low, high] == pytest.approx(expected, abs=0.03 * np.ptp(expected))


def test_against_scipy():
    random = np.random.default_rng(0)
    errors, reference = random.integers(0, 5, (2, 1, 300))
    tokens = random.integers(5, 30, 300)
    expected = scipy.stats.bootstrap(
        (errors[0], reference[0], tokens),
        lambda a, b, n, axis: 100 * (a - b).sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=random,
    ).confidence_interval
    _, low, high = paired_bootstrap(errors, reference, tokens)
    width = expected.high - expected.low
    assert [low, high] == pytest.approx([expected.low, expected.high], abs=0.03 * width)


def test_against_the_normal_interval():
    """Utterances of one length: the difference is a mean, whose standard error is known."""
    random = np.random.default_rng(0)
    change = random.normal(0.5, 2, (1, 2000))
    _, low, high = paired_bootstrap(change, np.zeros((1, 2000)), np.full(2000, 10))
    half = 1.96 * change.std() / math.sqrt(2000)
    expected = [10 * (change.mean() - half), 10 * (change.mean() + half)]
    assert [low, high] == pytest.approx(expected, abs=0.05 * 20 * half)


def test_pairing_counts():
    """The same errors in both, but for one in each utterance: no doubt, however they vary."""
    reference = np.random.default_rng(0).integers(0, 20, (1, 50))
    tokens = np.full(50, 20)
    assert paired_bootstrap(reference + 1, reference, tokens) == pytest.approx((5, 5, 5))
    assert paired_bootstrap(reference, reference, tokens) == (0, 0, 0)


def test_groups_are_drawn_together():
    """Copies of an utterance tell no more than it does."""
    random = np.random.default_rng(0)
    errors, reference = random.random((2, 1, 6))
    tokens = random.integers(3, 9, 6)
    groups = [f"speaker {i % 6}" for i in range(60)]
    copies = [np.tile(x, 10) for x in (errors, reference, tokens)]
    together = paired_bootstrap(*copies, groups)
    assert together == pytest.approx(paired_bootstrap(errors, reference, tokens))
    alone = paired_bootstrap(*copies)
    assert alone[2] - alone[1] < 0.5 * (together[2] - together[1])


def test_seeds_that_disagree_widen_the_interval():
    errors = np.array([[2.0] * 40, [0.0] * 40])
    agree = np.ones((2, 40))
    tokens = np.full(40, 10)
    assert paired_bootstrap(agree, 0 * agree, tokens) == pytest.approx((10, 10, 10))
    assert paired_bootstrap(errors, 0 * agree, tokens) == pytest.approx((10, 0, 20))


def test_one_unit_and_none_with_tokens():
    value, low, high = paired_bootstrap(np.ones((1, 1)), np.zeros((1, 1)), np.array([4]))
    assert (value, math.isnan(low), math.isnan(high)) == (25, True, True)
    # Half the draws of these two have no token in one of four cases.
    _, low, high = paired_bootstrap(np.array([[1, 0]]), np.zeros((1, 2)), np.array([4, 0]))
    assert (low, high) == (25, 50) or (low, high) == (25, 25)


def test_pairs():
    enhancement = ["noisy", "enh", "ssl_mse", "ssl_softdtw"]
    assert compared_pairs(enhancement) == [
        ("enh", "noisy"),
        ("ssl_mse", "enh"),
        ("ssl_softdtw", "enh"),
        ("ssl_softdtw", "ssl_mse"),
    ]
    assert compared_pairs(["base", "laser"]) == [("laser", "base")]
    assert compared_pairs(["noisy", "ssl_softdtw"]) == []


WORSE = {f"u{i:02}": 2 for i in range(30)}
BETTER = {f"u{i:02}": 1 for i in range(30)}


def test_marks(experiment_of):
    errors = {"noisy": WORSE, "enh": WORSE, "ssl_mse": BETTER, "ssl_softdtw": BETTER}
    experiment = Experiment.read(experiment_of({"1": errors, "2": errors}))
    found = differences(experiment)
    assert {(one.system, one.reference): one.value for one in found} == {
        ("enh", "noisy"): 0,
        ("ssl_mse", "enh"): -25,
        ("ssl_softdtw", "enh"): -25,
        ("ssl_softdtw", "ssl_mse"): 0,
    }
    assert {(one.units, one.unit, one.seeds) for one in found} == {(30, "utterances", ("1", "2"))}
    assert marks(found) == {
        (task, "test_clean", system): "*"
        for task in ("pr", "asr")
        for system in ("ssl_mse", "ssl_softdtw")
    }
    text = legend(found, experiment.labels)
    assert "* from before fine-tuning" in text
    assert "30 utterances and the 2 seeds" in text


def test_speakers_are_drawn_where_there_are_enough(experiment_of):
    path = experiment_of({"1": {"base": WORSE, "laser": BETTER}})
    data = path.parent / "dump" / "raw"
    (data / "test_all").mkdir(parents=True)
    (data / "test_clean").mkdir()
    record = path / "seed1" / "base" / "superb" / "pr" / "best" / "decode" / "scores.json.inputs"
    record.write_text("# Its inputs, as cksum prints them:\n#   1 2 dump/raw/test_all/phn\n")
    for speakers, expected in ((19, ("utterances", 30)), (20, ("speakers", 20))):
        lines = [f"u{i:02} s{i % speakers}\n" for i in range(30)]
        (data / "test_clean" / "utt2spk").write_text("".join(lines))
        [one, _] = differences(Experiment.read(path))
        assert (one.unit, one.units) == expected


def test_other_transcripts_are_refused(experiment_of):
    other = {**BETTER, "another": 0}
    path = experiment_of({"1": {"base": WORSE, "laser": other}})
    with pytest.raises(InputError, match=r"scores\.tsv: set test_clean: other .* those of laser"):
        differences(Experiment.read(path))


def test_seeds_and_scores_that_are_missing(experiment_of):
    path = experiment_of({"1": {"base": WORSE, "laser": BETTER}, "2": {"base": WORSE}})
    found = differences(Experiment.read(path))
    assert [one.seeds for one in found] == [("1",), ("1",)]
    assert "another training" in legend(found, {})
    for file in path.glob("**/scores.tsv"):
        file.unlink()
    assert differences(Experiment.read(path)) == []
    assert legend([], {}) == ""
