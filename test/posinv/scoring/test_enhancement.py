import logging
import math

import numpy as np
import pytest
import soundfile

from posinv.errors import InputError
from posinv.scoring import enhancement
from posinv.scoring.enhancement import (
    enhancement_scores,
    has_dnsmos,
    has_pesq,
    score_enhancement,
    si_sdr,
)

needs_pesq = pytest.mark.skipif(not has_pesq(16000), reason="the package pesq is not installed")


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples)


def speech(fs: int = 16000, seconds: float = 2.0) -> np.ndarray:
    """Bursts of a buzz, enough of speech for PESQ to find utterances."""
    time = np.arange(int(fs * seconds)) / fs
    buzz = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 20))
    return 0.1 * buzz * (np.sin(2 * np.pi * 1.5 * time) > 0)


class TestSiSdr:
    def test_by_hand(self):
        # Both of zero mean and orthogonal, of energies 10 and 1.
        ref, error = np.array([2, -2, 1, -1]), np.array([0.5, 0.5, -0.5, -0.5])
        assert si_sdr(ref + error, ref) == pytest.approx(10, rel=1e-12)

    @pytest.mark.parametrize(("scale", "offset"), [(1, 0), (-3, 0), (0.01, 5), (100, -2)])
    def test_scale_and_offset_do_not_matter(self, scale, offset):
        ref, est = noise(500), noise(500) + noise(500, seed=1)
        assert si_sdr(scale * est + offset, ref - offset) == pytest.approx(si_sdr(est, ref))

    @pytest.mark.parametrize("samples", [3, 1000])
    def test_against_fast_bss_eval(self, samples):
        oracle = pytest.importorskip("fast_bss_eval")
        ref, est = noise(samples), noise(samples) + 0.3 * noise(samples, seed=1)
        expected = oracle.si_sdr(
            ref[None], est[None], zero_mean=True, clamp_db=None, return_perm=False
        )
        assert si_sdr(est, ref) == pytest.approx(expected.item(), rel=1e-6)

    def test_float32_is_computed_in_float64(self):
        ref, est = (x.astype(np.float32) for x in (noise(10000), noise(10000, seed=1) / 1e3))
        exact = si_sdr(est.astype(np.float64), ref.astype(np.float64))
        assert si_sdr(est, ref) == exact

    def test_ends(self):
        ref = np.array([1.0, -1.0])
        assert si_sdr(ref, ref) == math.inf
        assert math.isnan(si_sdr(np.zeros(2), ref))
        assert math.isnan(si_sdr(ref, np.ones(2)))
        assert math.isnan(si_sdr(ref[:1], ref[:1]))


class TestEnhancementScores:
    def test_order_with_noise(self):
        ref = speech()
        little, much = (
            enhancement_scores(ref, ref + level * noise(ref.size), 16000) for level in (0.1, 10)
        )
        assert list(little)[:2] == ["si_sdr", "stoi"]
        assert all(little[metric] > much[metric] for metric in little if "dnsmos" not in metric)
        assert 0.9 < little["stoi"] <= 1

    def test_si_sdr_takes_the_clean_one_as_reference(self):
        ref = speech()
        est = ref + noise(ref.size) + np.roll(ref, 40)
        assert enhancement_scores(ref, est, 16000)["si_sdr"] == si_sdr(est, ref)

    @needs_pesq
    @pytest.mark.parametrize(("fs", "mode"), [(16000, "wb"), (8000, "nb")])
    def test_pesq_mode(self, fs, mode):
        import pesq

        ref = speech(fs)
        est = ref + noise(ref.size)
        assert enhancement_scores(ref, est, fs)["pesq"] == pesq.pesq(fs, ref, est, mode)

    def test_dnsmos(self, monkeypatch):
        """A stand-in for speechmos, which needs not be installed."""
        heard = []

        class Speechmos:
            @staticmethod
            def run(samples, fs):
                heard.append((samples, fs))
                return {"ovrl_mos": np.float64(3.1), "sig_mos": 3.2, "bak_mos": 3.3, "p808_mos": 4}

        monkeypatch.setattr(enhancement, "dnsmos", Speechmos)
        ref, est = speech(), 20 * noise(32000)
        scores = enhancement_scores(ref, est, 16000)
        found = {name: value for name, value in scores.items() if "dnsmos" in name}
        assert found == {"dnsmos": 3.1, "dnsmos_sig": 3.2, "dnsmos_bak": 3.3}
        [(samples, fs)] = heard
        assert fs == 16000
        assert np.array_equal(samples, np.clip(est, -1, 1))
        assert math.isnan(enhancement_scores(ref, 0 * ref, 16000)["dnsmos"])
        assert "dnsmos" not in enhancement_scores(speech(8000), speech(8000), 8000)

    @pytest.mark.skipif(not has_dnsmos(16000), reason="the package speechmos is not installed")
    def test_dnsmos_of_noise_is_low(self):
        scores = enhancement_scores(speech(), noise(32000), 16000)
        assert 1 <= scores["dnsmos"] < 2
        assert 1 <= scores["dnsmos_bak"] < 2.5

    def test_no_pesq(self, monkeypatch):
        assert "pesq" not in enhancement_scores(speech(10000), speech(10000), 10000)
        monkeypatch.setattr(enhancement, "pesq", None)
        monkeypatch.setattr(enhancement, "dnsmos", None)
        assert not has_pesq(16000)
        assert enhancement_scores(speech(), speech(), 16000).keys() == {"si_sdr", "stoi"}

    @pytest.mark.parametrize("samples", [1, 100, 1000, 4000])
    def test_too_short_is_undefined(self, samples):
        scores = enhancement_scores(noise(samples), noise(samples, seed=1), 16000)
        assert math.isnan(scores["stoi"])
        if "pesq" in scores and samples < 4000:
            assert math.isnan(scores["pesq"])
        assert math.isnan(scores["si_sdr"]) == (samples == 1)

    def test_silence_is_undefined(self):
        silence = np.zeros(16000)
        scores = enhancement_scores(silence, speech()[:16000], 16000)
        assert all(math.isnan(score) for score in scores.values())
        scores = enhancement_scores(speech()[:16000], silence, 16000)
        assert math.isnan(scores["si_sdr"])
        assert math.isnan(scores.get("pesq", math.nan))
        assert scores["stoi"] == pytest.approx(0, abs=1e-6)

    def test_lengths(self):
        with pytest.raises(InputError, match="reference of 10 samples, enhanced speech of 11"):
            enhancement_scores(noise(10), noise(11), 16000)


class TestScoreEnhancement:
    @pytest.fixture
    def corpus(self, tmp_path):
        """Two sets; utterance b1 is enhanced to silence, b2 too short."""
        folder = tmp_path / "with spaces"
        folder.mkdir()
        audio = {
            "a1": (speech(), speech() + noise(32000)),
            "a2": (speech(), speech() + 3 * noise(32000, seed=2)),
            "b1": (speech(), np.zeros(32000)),
            "b2": (noise(900), noise(900) + 0.1 * noise(900, seed=3)),
            "b3": (speech(), speech() + 0.3 * noise(32000, seed=4)),
        }
        for which, name in enumerate(("ref", "inf")):
            lines = []
            for utterance, pair in audio.items():
                path = folder / f"{name} {utterance}.wav"
                soundfile.write(path, pair[which] / 2, 16000, "FLOAT")
                lines.append(f"{utterance} {path}\n")
            (tmp_path / f"{name}.scp").write_text("".join(lines))
        (tmp_path / "utt2set").write_text("a1 seen\na2 seen\nb1 new\nb2 new\nb3 new\n")
        return tmp_path

    def score(self, corpus, **options):
        files = [corpus / name for name in ("ref.scp", "inf.scp", "utt2set")]
        return score_enhancement(*files, **options)

    @pytest.mark.parametrize("nj", [1, 2])
    def test_means(self, corpus, nj, caplog):
        means, rows = self.score(corpus, nj=nj)
        assert [row["utterance"] for row in rows] == ["a1", "a2", "b1", "b2", "b3"]
        assert list(means) == ["seen", "new"]
        for metric in ("si_sdr", "stoi", "pesq")[: 3 if has_pesq(16000) else 2]:
            a1, a2, b1, b2, b3 = (row[metric] for row in rows)
            assert means["seen"][metric] == pytest.approx((a1 + a2) / 2)
            assert means["seen"][f"{metric}_failed"] == 0
            defined = [x for x in (b1, b2, b3) if not math.isnan(x)]
            assert means["new"][metric] == pytest.approx(sum(defined) / len(defined))
            assert means["new"][f"{metric}_failed"] == 3 - len(defined)
        assert means["seen"]["utterances"] == 2
        assert means["new"]["utterances"] == 3
        assert means["new"]["si_sdr_failed"] == means["new"]["stoi_failed"] == 1
        if has_pesq(16000):
            assert means["new"]["pesq_failed"] == 2
            assert "new: pesq is undefined for 2 of 3 utterances" in caplog.text
        assert "seen:" not in caplog.text

    def test_without_pesq(self, corpus, monkeypatch, caplog):
        monkeypatch.setattr(enhancement, "pesq", None)
        with caplog.at_level(logging.WARNING):
            means, rows = self.score(corpus, nj=1)
        assert means["seen"]["pesq"] is means["seen"]["pesq_failed"] is None
        assert not any("pesq" in row for row in rows)
        assert caplog.text.count("PESQ is left out: the package pesq is not installed") == 1

    def test_nothing_defined(self, corpus):
        (corpus / "utt2set").write_text("a1 a\na2 a\nb1 a\nb2 short\nb3 a\n")
        means, _ = self.score(corpus)
        assert means["short"]["stoi"] is None
        assert means["short"]["stoi_failed"] == 1

    def test_lengths_must_match(self, corpus):
        soundfile.write(corpus / "with spaces" / "inf a2.wav", noise(31999), 16000)
        with pytest.raises(InputError, match=r"inf\.scp: utterance a2: .* 32000 .* 31999"):
            self.score(corpus)

    def test_rate_must_match(self, corpus):
        with pytest.raises(InputError, match=r"utterance a1: .* 16000 Hz, not 8000 Hz"):
            self.score(corpus, sampling_rate=8000)

    @pytest.mark.parametrize("name", ["ref.scp", "inf.scp", "utt2set"])
    def test_ids_must_match(self, corpus, name):
        path = corpus / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
        with pytest.raises(InputError, match=rf"{name}: no utterance b2, .* \(2 such\)"):
            self.score(corpus)
