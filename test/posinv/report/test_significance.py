import itertools
import math

import numpy as np
import pytest
import scipy.stats

from posinv.data.tables import write_table, write_tsv
from posinv.errors import InputError
from posinv.report.enhancement import enhancement_tables
from posinv.report.experiment import Experiment
from posinv.report.results import NONE_PUBLISHED
from posinv.report.significance import (
    compare_measures,
    compared_pairs,
    differences,
    legend,
    marks,
    paired_bootstrap,
)
from posinv.report.tables import ScoreReader


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


def scipy_interval(samples, statistic, random):
    return scipy.stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=random,
    ).confidence_interval


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
    expected = scipy_interval(
        (errors[0], reference[0], tokens),
        lambda a, b, n, axis: 100 * (a - b).sum(axis) / n.sum(axis),
        random,
    )
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


@pytest.fixture
def measured(tmp_path):
    """Make an experiment of SI-SDRs: ``{seed: {system: {test set: {utterance: SI-SDR}}}}``."""

    def make(values):
        for seed, systems in values.items():
            for system, sets in systems.items():
                rows = [
                    {"utterance": utterance, "set": name, "si_sdr": value}
                    for name, utterances in sets.items()
                    for utterance, value in utterances.items()
                ]
                path = tmp_path / "exp" / f"seed{seed}" / system / "enhanced" / "scores.tsv"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tsv(path, ("utterance", "set", "si_sdr"), rows)
        return Experiment.read(tmp_path / "exp")

    return make


SEEN, UNSEEN = "test_seen", "test_unseen"


def of_seen(values, sets=(SEEN, UNSEEN)):
    """(sets, U) values as the utterances of test sets, named as the recipes name them."""
    return {
        name: {f"u{k:02}-{name[5:]}": float(value) for k, value in enumerate(row)}
        for name, row in zip(sets, values, strict=True)
    }


class TestMeasures:
    def test_against_scipy(self, measured):
        """The versions of an utterance are drawn together: a mean over both, then a bootstrap."""
        random = np.random.default_rng(0)
        ours, theirs = random.normal(10, 3, (2, 2, 200))
        ours[1] += 2 * ours[0]  # so that drawing the versions apart would give another interval
        experiment = measured({"1": {"enh": of_seen(theirs), "ssl_mse": of_seen(ours)}})
        pair = (experiment, "ssl_mse"), (experiment, "enh")
        found = compare_measures("si_sdr", [SEEN, UNSEEN], *pair)
        assert found.value == pytest.approx((ours - theirs).mean())
        assert (found.unit, found.units) == ("utterances", 200)
        assert (found.test_set, found.measure) == ("test_seen and test_unseen", "SI-SDR (dB)")
        expected = scipy_interval(
            (ours.mean(0), theirs.mean(0)), lambda a, b, axis: (a - b).mean(axis), random
        )
        width = expected.high - expected.low
        ends = pytest.approx([expected.low, expected.high], abs=0.05 * width)
        assert [found.low, found.high] == ends

    def test_it_is_the_difference_of_the_tables_figures(self, measured):
        """Each set counts the same, and each seed, however many utterances a set has."""
        random = np.random.default_rng(0)
        values = {
            seed: {
                system: {
                    SEEN: {f"u{k}-seen": random.normal() for k in range(7)},
                    UNSEEN: {f"u{k}-unseen": random.normal() for k in range(3)},
                }
                for system in ("enh", "ssl_mse")
            }
            for seed in ("1", "2")
        }
        experiment = measured(values)
        [found] = differences(experiment, {"si_sdr": [SEEN, UNSEEN]})
        figures = [
            np.mean(
                [
                    np.mean([*values[seed][system][name].values()])
                    for seed in values
                    for name in (SEEN, UNSEEN)
                ]
            )
            for system in ("ssl_mse", "enh")
        ]
        assert found.value == pytest.approx(figures[0] - figures[1])
        assert found.seeds == ("1", "2")
        assert found.low < found.value < found.high

    def test_more_is_better(self, measured):
        low, high = of_seen([[1, 2, 3]] * 2), of_seen([[2, 3, 4]] * 2)
        experiment = measured({"1": {"enh": low, "ssl_mse": high, "ssl_softdtw": low}})
        found = differences(experiment, {"si_sdr": [SEEN, UNSEEN]})
        said = [(one.system, one.reference, one.value, one.better) for one in found]
        assert said == [
            ("ssl_mse", "enh", 1, True),
            ("ssl_softdtw", "enh", 0, False),
            ("ssl_softdtw", "ssl_mse", -1, False),
        ]
        key = "si_sdr", "test_seen and test_unseen"
        assert marks(found) == {(*key, "ssl_mse"): "*", (*key, "ssl_softdtw"): "\N{DAGGER}"}
        assert legend(found, experiment.labels).startswith("Differs in SI-SDR: * from before")
        assert found[0].interval == "+1.00 to +1.00"

    def test_undefined_utterances_are_left_out_of_both(self, measured):
        ours, theirs = of_seen([[5, 6, math.nan]], [SEEN]), of_seen([[math.inf, 4, 1]], [SEEN])
        experiment = measured({"1": {"enh": theirs, "ssl_mse": ours}})
        pair = (experiment, "ssl_mse"), (experiment, "enh")
        found = compare_measures("si_sdr", [SEEN], *pair)
        assert (found.value, found.units, found.interval) == (2, 1, "none")
        nothing = measured({"1": {"ssl_mse": of_seen([[5, math.nan, math.nan]], [SEEN])}})
        pair = (nothing, "ssl_mse"), (nothing, "enh")
        assert compare_measures("si_sdr", [SEEN], *pair) is None

    def test_what_was_not_scored_is_not_compared(self, measured):
        values = {"1": {"enh": of_seen([[1, 2]] * 2), "ssl_mse": of_seen([[2, 3]], [SEEN])}}
        experiment = measured(values)
        pair = (experiment, "ssl_mse"), (experiment, "enh")
        assert compare_measures("si_sdr", [SEEN, UNSEEN], *pair) is None
        assert compare_measures("pesq", [SEEN], *pair) is None
        assert compare_measures("si_sdr", [], *pair) is None
        assert compare_measures("si_sdr", [SEEN], *pair).value == 1

    def test_other_utterances_are_refused(self, measured):
        others = {SEEN: {"u00-seen": 1.0, "x-seen": 1.0}}
        experiment = measured({"1": {"enh": of_seen([[1, 2]], [SEEN]), "ssl_mse": others}})
        message = r"enhanced/scores\.tsv: set test_seen: other .* than those of ssl_mse"
        with pytest.raises(InputError, match=message):
            differences(experiment, {"si_sdr": [SEEN]})

    def test_speakers_are_drawn_where_there_are_enough(self, measured, tmp_path):
        values = np.random.default_rng(0).normal(size=(2, 2, 40))
        experiment = measured({"1": {"enh": of_seen(values[0]), "ssl_mse": of_seen(values[1])}})
        raw = tmp_path / "dump" / "raw"
        for name in (SEEN, UNSEEN):
            (raw / name).mkdir(parents=True)
            speakers = {f"u{k:02}-{name[5:]}": f"s{k % 20}" for k in range(40)}
            write_table(raw / name / "utt2spk", speakers)
        (raw / "test_all").mkdir()
        record = experiment.enhanced("1", "enh").with_suffix(".json.inputs")
        record.write_text("# Its inputs, as cksum prints them:\n#   1 2 dump/raw/test_all/text\n")
        [found] = differences(experiment, {"si_sdr": [SEEN, UNSEEN]})
        assert (found.unit, found.units) == ("speakers", 20)

    def test_the_table_is_marked(self, measured):
        low, high = of_seen([[1, 2, 3]] * 2), of_seen([[2, 3, 4]] * 2)
        experiment = measured({"1": {"enh": low, "ssl_mse": high}})
        sets = [SEEN, UNSEEN]
        found = differences(experiment, {"si_sdr": sets})
        read = ScoreReader(strict=False)
        table = enhancement_tables(
            experiment, experiment.labels, [], sets, read, NONE_PUBLISHED, [], found
        )[-1]
        assert [[cell.marks for cell in row] for row in table.rows] == [
            [""] * 5,
            ["", "*", *[""] * 3],
        ]
        assert table.rows[1][1].about == "+1.00 (+1.00 to +1.00) against enh"
        assert "Differs in SI-SDR" in "".join(table.notes)
