"""The report in headless Chromium: ``apt-get install chromium``."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

from posinv.report.experiment import Experiment
from posinv.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")

# What a user of the page would see, as JSON in an element of its own.
PROBE = """
<script>
(async () => {
  const waiting = (player) => new Promise((done) => {
    if (player.readyState > 0 || player.error) done();
    else for (const name of ["loadedmetadata", "error"]) player.addEventListener(name, done);
  });
  const players = [...document.querySelectorAll("audio")];
  await Promise.all(players.map(waiting));
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode().catch(() => {})));
  const order = (table, column) => [...table.tBodies[0].rows].map(
    (row) => row.children[column].dataset.value);
  const sorted = [];
  for (const table of document.querySelectorAll("table")) {
    table.querySelectorAll("th button").forEach((button, column) => {
      for (const _ of [1, 2]) {
        button.click();
        const state = button.closest("th").getAttribute("aria-sort");
        sorted.push([state, order(table, column)]);
      }
    });
  }
  const scheme = () => getComputedStyle(document.documentElement).colorScheme;
  const before = scheme();
  document.getElementById("theme").click();
  const result = {
    durations: players.map((player) => player.duration),
    widths: images.map((image) => image.naturalWidth),
    drawings: [...document.querySelectorAll("figure svg")].map((svg) => svg.clientWidth),
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    sorted, schemes: [before, scheme()],
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(result);
  document.body.append(out);
  parent.postMessage(result.wider, "*");
})();
</script>
"""


def chromium(address, tmp_path, *options):
    """Return the page's DOM and what its console said."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--mute-audio"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=20000", "--dump-dom", *options, address]
    # It would write its settings into the home folder.
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(report, tmp_path):
    """Return what :data:`PROBE` finds in a copy of the report."""
    text = report.read_text()
    # The page allows no other script than its own.
    free = re.sub(r"<meta http-equiv=\"Content-Security-Policy\".*?>", "", text)
    copy = tmp_path / "probed.html"
    copy.write_text(free.replace("</body>", f"{PROBE}</body>"))
    dom, console = chromium(copy.as_uri(), tmp_path)
    assert console == []
    return json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))


@pytest.fixture(scope="module")
def report(enh_experiment, tmp_path_factory):
    out = tmp_path_factory.mktemp("a page") / "the report.html"
    write_report(Experiment.read(enh_experiment), out, "A title", "- command: `x`\n")
    return out


def test_no_errors_in_the_console(report, tmp_path):
    dom, console = chromium(report.as_uri(), tmp_path)
    assert console == []
    assert "A title" in dom


def test_a_user_sees_hears_and_sorts(report, tmp_path):
    found = probe(report, tmp_path)
    assert found["durations"] == pytest.approx([0.75] * 10)  # 12000 samples
    assert len(found["widths"]) == 10 and all(found["widths"])
    assert len(found["drawings"]) >= 4 and all(found["drawings"])
    assert found["wider"] <= 0
    assert set(found["schemes"]) == {"light", "dark"}
    assert len(found["sorted"]) > 40
    for state, values in found["sorted"]:
        known = [value for value in values if value != ""]
        assert values == known + [""] * (len(values) - len(known))
        try:
            keys = [float(value) for value in known]
        except ValueError:
            continue  # the browser's own order of words
        assert keys == sorted(keys, reverse=state == "descending")


def test_a_phone_does_not_scroll_sideways(report, tmp_path):
    probe_of = tmp_path / "phone.html"
    text = report.read_text()
    free = re.sub(r"<meta http-equiv=\"Content-Security-Policy\".*?>", "", text)
    (tmp_path / "probed.html").write_text(free.replace("</body>", f"{PROBE}</body>"))
    probe_of.write_text(
        "<script>addEventListener('message', (e) => { document.title = `wider ${e.data}`; });"
        "</script><iframe src='probed.html' style='width: 375px; height: 800px'></iframe>"
    )
    dom, _ = chromium(probe_of.as_uri(), tmp_path)
    assert "<title>wider 0</title>" in dom


def test_an_empty_run(tmp_path):
    (tmp_path / "exp").mkdir()
    out = tmp_path / "report.html"
    write_report(Experiment.read(tmp_path / "exp"), out, "Nothing yet", "")
    found = probe(out, tmp_path)
    assert (found["durations"], found["widths"], found["sorted"]) == ([], [], [])
    assert found["wider"] <= 0
