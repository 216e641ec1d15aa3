import configparser
import importlib
import sys
from pathlib import Path

import pytest

from posinv.bin import console_script

SETUP = Path(__file__).resolve().parents[3] / "setup.cfg"


def scripts():
    config = configparser.ConfigParser()
    config.read(SETUP)
    lines = config["options.entry_points"]["console_scripts"].split("\n")
    return [line.split(" = ") for line in lines if line]


def test_every_script_is_named_for_a_command():
    assert len(scripts()) >= 8
    for name, target in scripts():
        assert target == "posinv.bin.console_script:main"
        command = name.removeprefix("posinv-").replace("-", "_")
        assert (Path(console_script.__file__).parent / f"{command}.py").is_file()


def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "/x/posinv-format-data",
            "--src",
            str(tmp_path / "no"),
            "--out",
            str(tmp_path / "out"),
            "--sampling_rate",
            "16000",
        ],
    )
    with pytest.raises(SystemExit) as exit:
        console_script.main()
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith("posinv-format-data: error: ")


def test_a_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(sys, "argv", ["posinv-enhance"])
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match=r"package yaml is not installed: pip install 'posinv"):
        console_script.main()
