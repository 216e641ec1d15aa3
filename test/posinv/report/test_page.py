import re
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from posinv.errors import InputError
from posinv.report import pictures
from posinv.report.experiment import Experiment
from posinv.report.page import write_report


class Elements(HTMLParser):
    """The elements of a page, and its text without scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.ids = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def page(enh_experiment, tmp_path_factory):
    out = tmp_path_factory.mktemp("a page") / "report.html"
    write_report(Experiment.read(enh_experiment), out, "A <title>", "- command: `<x>`\n")
    return out.read_text()


def test_nothing_is_taken_for_markup(page):
    elements = Elements(page)
    assert len(elements.all("script")) == 1
    # The page's own are the dots of the intervals, after the lines of these.
    own = [elements.found[k - 1][0] for k, (tag, _) in enumerate(elements.found) if tag == "b"]
    assert set(own) == {"i"}
    for text in ("<script>alert(1)</script>", "my <b>system", "A <title>", "<b>bold</b>", "<x>"):
        assert text in elements.text


def test_it_needs_nothing_else(page):
    elements = Elements(page)
    sources = [
        value
        for _, attrs in elements.found
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 15e6


def test_it_has_all_sections_and_ids_are_unique(page):
    elements = Elements(page)
    targets = {attrs["href"][1:] for attrs in elements.all("a")}
    sections = {"results", "differences", "convergence", "listen", "alignment", "layers"}
    assert targets == sections | {"settings", "time", "origin", "main"}
    assert targets <= set(elements.ids)
    assert len(elements.ids) == len(set(elements.ids))
    assert len(elements.all("audio")) == 2 * 5  # clean and four systems in each set
    assert all(attrs["alt"] for attrs in elements.all("img"))


def test_differences_of_measures(page):
    section = page[page.index('id="differences"') : page.index('id="convergence"')]
    table = section[section.index("<caption>SI-SDR (dB)</caption>") :]
    rows = re.findall(r"<tr><th scope.*?</tr>", table, re.S)
    texts = [re.sub(r"\s+", " ", re.sub(r"<.*?>", " ", row)).strip() for row in rows]
    better = "ssl_mse before fine-tuning test_seen +1.00 +1.00 to +1.00 3 utterances 1, 2"
    worse = "my &lt;b&gt;system ssl_mse test_seen -1.00 -1.00 to -1.00 3 utterances 1, 2"
    assert 'class="interval better"' in rows[texts.index(better)]
    assert 'class="interval worse"' in rows[texts.index(worse)]
    assert "--a:98.00;--b:98.00;--m:98.00" in rows[texts.index(better)]
    assert "SI-SDR (dB) 4.2" in page  # of an utterance to listen to


def test_settings_that_differ(page):
    assert "criterions.0.conf.layer" in page
    assert "criterions.0.conf.ssl" not in page  # the same in both


def test_an_utterance_may_be_chosen(enh_experiment, tmp_path):
    experiment = Experiment.read(enh_experiment)
    out = tmp_path / "report.html"
    write_report(experiment, out, "t", "", utterances=["u5"])
    assert re.findall(r"<h3>(.*?)</h3>", out.read_text())[0] == "u5"
    with pytest.raises(InputError, match="--utterances no: not in"):
        write_report(experiment, out, "t", "", utterances=["no"])


def test_command(enh_experiment, tmp_path, python):
    out = tmp_path / "a report.html"
    command = [*python, "-m", "posinv.bin.report", enh_experiment, "--out", out]
    options = ["--systems", "enh ssl_mse", "--seeds", "2", "--title", "mine"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"the report: {out}\n"
    text = out.read_text()
    assert "<h1>mine</h1>" in text
    assert "my &lt;b&gt;system" not in text
    assert "random seed 2 " in text


@pytest.mark.parametrize("state", ["empty", "no scores"])
def test_incomplete_runs(tmp_path, state, save_epochs):
    if state == "no scores":
        save_epochs(tmp_path / "seed1" / "laser", 2, alignment=lambda epoch: 1 / epoch)
        (tmp_path / "seed1" / "laser" / "config.yaml").write_text("max_epoch: 2\n")
        (tmp_path / "seed1" / "base").mkdir()
    out = tmp_path / "report.html"
    write_report(Experiment.read(tmp_path), out, "t", "")
    text = out.read_text()
    assert "This report is not complete" in text
    assert ("validation loss" in text) == (state == "no scores")


class TestPictures:
    def test_alignment_of_equal_features_is_the_diagonal(self):
        x = torch.randn(7, 5)
        alignment = pictures.align_features(x, 3 * x, 0.01)
        assert np.abs(np.diag(alignment.distance)).max() < 1e-12
        assert alignment.path.tolist() == [[k, k] for k in range(7)]
        assert np.diag(alignment.expected) == pytest.approx(np.ones(7), abs=1e-3)

    def test_path_of_other_lengths(self):
        x = torch.eye(4)
        alignment = pictures.align_features(x, x.repeat_interleave(2, 0), 0.1)
        assert alignment.path.tolist() == [[k // 2, k] for k in range(8)]

    def test_image_has_the_path_at_the_lower_left(self):
        x = torch.randn(150, 5)
        image = pictures.alignment_image(pictures.align_features(x, x, 0.1))
        assert image.shape == (300, 2 * (150 + 4 + 150), 3)
        path = (image == pictures.PATH).all(axis=2)
        assert path[-1, 0] and path[0, 299] and not path[0, 0]
        assert path.sum() == 4 * 150

    def test_spectrogram_shows_a_tone_where_it_is(self):
        tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
        image = pictures.spectrogram(tone)
        assert image.dtype == np.uint8
        # 512 samples: 31.25 Hz a row, the lowest frequency in the last row.
        assert set(image[:, 5:-5].argmax(axis=0)) == {image.shape[0] - 1 - 32}
        assert (pictures.spectrogram(0.1 * tone, pictures.spectrum(tone).max()) <= image).all()
        assert pictures.png(image).startswith(b"\x89PNG")

    def test_silence_and_one_sample(self):
        for wave in (np.zeros(1), np.zeros(16000)):
            assert np.isfinite(pictures.spectrum(wave)).all()
            assert pictures.png(pictures.spectrogram(wave, 10.0))

    def test_one_frame(self):
        alignment = pictures.align_features(torch.ones(1, 3), torch.ones(1, 3), 0.1)
        assert alignment.path.tolist() == [[0, 0]]
        text = pictures.svg(pictures.alignment_figure(alignment, 0.02, "a", "b"), "one")
        assert text.startswith("<svg")
