import json
import sys

import pytest

from posinv.bin.cli import run
from posinv.bin.enh_results import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rates = {"clean": {"rate": 12.34}, "noisy": {"rate": 56.78}}
    metrics = {"si_sdr": 5.0, "stoi": 0.9, "pesq": None, "dnsmos": None}
    failed = {"si_sdr_failed": 0, "stoi_failed": 0, "pesq_failed": None, "utterances": 3}
    failed["dnsmos_failed"] = None
    for system in ("enh", "ssl_mse"):
        base = tmp_path / "exp" / "seed1" / system
        for scored in ("superb/pr/best/decode", "superb/asr/best/decode", "enhanced"):
            (base / scored).mkdir(parents=True)
            scores = {"noisy": metrics | failed} if scored == "enhanced" else rates
            (base / scored / "scores.json").write_text(json.dumps(scores))
    arguments = [
        *("--expdir", str(tmp_path / "exp"), "--out", str(tmp_path / "RESULTS.md")),
        *("--systems", "enh=before fine-tuning", "ssl_mse", "--sets", "clean noisy"),
        *("--enh_sets", "noisy", "--seeds", "1", "--command", "./run.sh", "--title", "Mine"),
    ]
    monkeypatch.setattr(sys, "argv", ["posinv/bin/enh_results.py", *arguments])
    return tmp_path


def test_prints_what_it_writes(folder, capsys):
    run(main)
    printed = capsys.readouterr().out
    written = (folder / "RESULTS.md").read_text()
    assert written.startswith("# Mine\n")
    assert printed.strip() in written
    assert "| before fine-tuning |  12.3 |  56.8 |\n" in printed
    dash = "\N{EN DASH}"
    assert f"| ssl_mse            |         5.0 | 0.900 |    {dash} |      {dash} |\n" in printed
    assert "- command: `./run.sh`\n" in printed


@pytest.mark.parametrize("seeds", ["", "1 1"])
def test_names_are_checked(folder, capsys, seeds):
    sys.argv[sys.argv.index("--seeds") + 1] = seeds
    with pytest.raises(SystemExit) as exit_status:
        run(main)
    assert exit_status.value.code == 2
    assert "at least one name, and none twice" in capsys.readouterr().err


def test_a_system_named_twice(folder, capsys):
    sys.argv[sys.argv.index("ssl_mse")] = "enh=again"
    with pytest.raises(SystemExit):
        run(main)
    assert (
        capsys.readouterr().err
        == "enh_results: error: --systems: enh is named twice: name it once\n"
    )
