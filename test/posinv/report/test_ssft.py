import json
import re

import pytest
import yaml

from posinv.errors import InputError
from posinv.report.curves import plot_curves, read_epochs
from posinv.report.results import ABSENT, Published
from posinv.report.ssft import ssft_report

SYSTEMS = ["base", "laser"]


@pytest.fixture
def expdir(tmp_path, save_epochs):
    for s, seed in enumerate("12"):
        for y, system in enumerate(SYSTEMS):
            base = tmp_path / f"seed{seed}" / system
            for t, task in enumerate(("pr", "asr")):
                best = base / "superb" / task / "best"
                (best / "decode").mkdir(parents=True)
                rates = {"test_clean": {"rate": 50 * t + 20 * y + s}}
                (best / "decode" / "scores.json").write_text(json.dumps(rates))
                config = {"optim_conf": {"lr": 1e-3 if system == "base" else 1e-3 * (s + 1)}}
                (best / "config.yaml").write_text(yaml.safe_dump(config))
            collapse = {"frame_distance": 1.0 + y + 0.5 * s, "effective_rank": 10 * (y + 1)}
            (base / "collapse.json").write_text(json.dumps(collapse))
            if system != "base":
                save_epochs(base, 2)
    return tmp_path


def rows(text, system):
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if re.match(rf"\| {system} ", line)
    ]


def test_one_seed(expdir):
    text = ssft_report(expdir, SYSTEMS, ["test_clean"], ["1"])
    assert rows(text, "base") == [
        ["base", "0.0", "0.001", "50.0", "0.001", ABSENT],
        ["base", "1.000", "10.0"],
    ]
    # Epochs of 1 and 2 minutes of training, and as much of validation.
    assert rows(text, "laser")[0] == ["laser", "20.0", "0.001", "70.0", "0.001", "6.0"]


def test_published_figures_stand_beside_ours(expdir):
    published = Published({("laser", "pr", "test_clean"): ("4.28", "the paper")})
    text = ssft_report(expdir, SYSTEMS, ["test_clean"], ["1"], published)
    assert rows(text, "SSL model")[0][:4] == [
        "SSL model",
        "PER test_clean",
        "published",
        "lr for PER",
    ]
    assert rows(text, "base")[0] == ["base", "0.0", "", "0.001", "50.0", "0.001", ABSENT]
    assert rows(text, "laser")[0][:4] == ["laser", "20.0", "4.28", "0.001"]
    assert "\n\nPublished: laser, PER test_clean: 4.28 (the paper).\n\n" in text


def test_query_by_example_has_a_table_of_its_own(expdir):
    for seed, value in (("1", 0.25), ("2", 0.3)):
        for system in SYSTEMS:
            path = expdir / f"seed{seed}" / system / "qbe" / "scores.json"
            path.parent.mkdir()
            path.write_text(json.dumps({"quesst14_eval": {"mtwv": value}}))
    plain = ssft_report(expdir, SYSTEMS, ["test_clean"], ["1", "2"])
    assert "MTWV" not in plain
    published = Published({("laser", "qbe", "quesst14_eval"): ("8.1", "the paper")})
    text = ssft_report(
        expdir, SYSTEMS, ["test_clean"], ["1", "2"], published, qbe_sets=["quesst14_eval"]
    )
    assert (
        "\n\nQuery-by-example search, maximum term weighted value (MTWV, times 100), mean" in text
    )
    assert rows(text, "SSL model")[1] == ["SSL model", "quesst14_eval", "published"]
    assert rows(text, "base")[1] == ["base", "27.5 ± 3.5", ""]
    assert rows(text, "laser")[1] == ["laser", "27.5 ± 3.5", "8.1"]
    assert "\n\nPublished: laser, MTWV quesst14_eval: 8.1 (the paper).\n\n" in text
    assert rows(text, "base")[0] == rows(plain, "base")[0]
    assert rows(text, "base")[2] == rows(plain, "base")[1]


def test_several_seeds(expdir):
    text = ssft_report(expdir, SYSTEMS, ["test_clean"], ["1", "2"])
    assert rows(text, "laser") == [
        ["laser", "20.5 ± 0.7", "0.001, 0.002", "70.5 ± 0.7", "0.001, 0.002", "6.0 ± 0.0"],
        ["laser", "2.250 ± 0.354", "20.0 ± 0.0"],
    ]


@pytest.mark.parametrize(
    "path",
    [
        "superb/asr/best/decode/scores.json",
        "superb/pr/best/config.yaml",
        "collapse.json",
        "checkpoint.pth",
    ],
)
def test_what_is_missing_is_named(expdir, path):
    (expdir / "seed2" / "laser" / path).unlink()
    with pytest.raises(InputError, match=re.escape(str(expdir / "seed2" / "laser" / path))):
        ssft_report(expdir, SYSTEMS, ["test_clean"], ["1", "2"])


def test_epochs_are_in_order(tmp_path, save_epochs):
    save_epochs(tmp_path, 3)
    epochs = read_epochs(tmp_path)
    assert [epoch["train"]["time"] for epoch in epochs] == [60, 120, 180]
    assert [epoch["valid"]["loss"] for epoch in epochs] == pytest.approx([1 / 2, 1 / 3, 1 / 4])


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.pth"):
        read_epochs(tmp_path)
    (tmp_path / "checkpoint.pth").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="not a checkpoint"):
        read_epochs(tmp_path)


def test_curves_are_an_image(expdir):
    out = expdir / "a b" / "curves.png"
    trainings = {"laser": [expdir / "seed1" / "laser", expdir / "seed2" / "laser"]}
    plot_curves(trainings, {"loss": "loss", "absent": "absent"}, out, {"loss": 0.5})
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
