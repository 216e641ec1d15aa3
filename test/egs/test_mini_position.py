"""The experiment on position, whole, at toy size."""

import json
import re

import pytest
import yaml


@pytest.mark.full
def test_criteria_are_compared_through_models_of_more_and_less_position(recipe):
    position = recipe("mini_position/enh1")
    enh_opts = (
        "--local_data_opts '--phrases 2 --minutes 1 --dev_minutes 0.1 --test_minutes 0.4' "
        "--ssl_units 10 --test_conditions 'clean seen'"
    )
    options = (
        *("--models", "conv0 sin16", "--criteria", "ssl_mse ssl_softdtw", "--seeds", "1 2"),
        *("--enh_opts", enh_opts, "--ssl_opts", ""),
    )
    done = position.run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    exp = position.dir / "exp"
    # The models differ in what they were asked to differ in, and share the enhancement model.
    configs = [
        json.loads((exp / model / "ssl/model/config.json").read_text())
        for model in ("conv0", "sin16")
    ]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {
        "positional_convolution",
        "sinusoid_scale",
    }
    weights = {
        (exp / model / "enh/valid.loss.best.pth").read_bytes() for model in ("conv0", "sin16")
    }
    assert len(weights) == 1
    assert not (exp / "conv0/enh/run.sh").exists()
    # One head of a model judges all systems and seeds, on clean speech.
    configurations = exp.resolve().glob("*/seed*/*/superb/*/lr_*/config.yaml")
    folders = {path.resolve().parent for path in configurations}  # seed 2 links to seed 1
    heads = sorted(str(folder.relative_to(exp.resolve())) for folder in folders)
    assert heads == [
        f"{model}/seed1/noisy/superb/{task}/lr_config"
        for model in ("conv0", "sin16")
        for task in ("asr", "pr")
    ]
    config = yaml.safe_load((exp / heads[0] / "config.yaml").read_text())
    assert config["frontend"] == "ssl"
    for system in ("noisy", "enh", "ssl_mse", "ssl_softdtw"):
        for seed in (1, 2):
            best = exp / f"conv0/seed{seed}/{system}/superb/pr/best"
            assert json.loads((best / "decode/scores.json").read_text()).keys() == {
                "test_clean",
                "test_seen",
            }
    probe = json.loads((exp / "sin16/position/position.json").read_text())
    assert probe["surviving"].keys() == {
        "noisy input",
        *(f"{criterion}/{seed}" for criterion in ("ssl_mse", "ssl_softdtw") for seed in (1, 2)),
    }
    text = (exp / "RESULTS.md").read_text()
    for row in ("| conv0     |", "| sin16     | ssl_softdtw |", "| sin16: ssl_softdtw "):
        assert row in text
    assert re.search(r"^\| SSL model \| +criterion \| +3 updates \|$", text, re.M)
    assert (exp / "position.png").exists() and (exp / "convergence.png").exists()

    again = position.run(*options)
    assert again.returncode == 0, again.stderr
    assert "exp/conv0/seed2/ssl_softdtw: finished already" in again.stdout
