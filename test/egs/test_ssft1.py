"""The SSFT recipes, whole, at toy size, through their own run.sh."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

SYSTEMS = ["base", "laser"]
SMALL = [
    *("--local_data_opts", "--minutes 1 --dev_minutes 0.1 --test_minutes 0.15"),
    *("--ssl_units", 10, "--methods", "laser", "--qbe", "true"),
]


@pytest.fixture(scope="module")
def mini(recipe):
    """The mini recipe after a whole run."""
    mini = recipe("mini/ssft1")
    done = mini.run(*SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return mini, done.stdout


def test_table(mini):
    recipe, output = mini
    rows = recipe.table(output)
    for system in SYSTEMS:
        assert sum(row.split("|")[1].strip() == system for row in rows) == 3  # rates, MTWV, spread
    header = next(row for row in rows if "PER" in row)
    for name in ("PER test_clean", "WER test_clean", "lr for PER", "lr for WER", "minutes"):
        assert name in header
    assert (recipe.dir / "exp" / "curves.png").stat().st_size > 1000


def test_queries_are_searched(mini):
    recipe, _ = mini
    assert "\nQuery-by-example search, maximum term" in (recipe.dir / "exp/RESULTS.md").read_text()
    words = (recipe.dir / "data/test_queries/wav.scp").read_text().splitlines()
    texts = (recipe.dir / "data/test/text").read_text().splitlines()
    for system in SYSTEMS:
        qbe = recipe.dir / "exp/seed1" / system / "qbe"
        [scores] = json.loads((qbe / "scores.json").read_text()).values()
        assert 0 <= scores["mtwv"] <= 1
        assert (scores["queries"], scores["documents"]) == (len(words), len(texts))
        assert len((qbe / "scores.tsv").read_text().splitlines()) == 1 + len(words) * len(texts)


def test_one_line_a_stage_with_its_time(mini):
    recipe, output = mini
    recipe.check_stages(output, last=7)


def test_only_the_last_layers_were_tuned(mini):
    recipe, _ = mini
    base = load_file(recipe.dir / "exp/ssl/model/model.safetensors")
    for method in SYSTEMS[1:]:
        tuned = load_file(recipe.dir / f"exp/seed1/{method}/model/model.safetensors")
        changed = {name for name in base if not torch.equal(base[name], tuned[name])}
        # Two layers in all: the toy model has no others.
        assert changed
        assert all(name.startswith("encoder.layers.") for name in changed)


def test_best_of_the_sweep_is_decoded(mini):
    recipe, _ = mini
    for system in SYSTEMS:
        for task in ("pr", "asr"):
            head = recipe.dir / "exp/seed1" / system / "superb" / task
            rates = json.loads((head / "best.json").read_text())
            assert rates.keys() == ({"lr_2e-3", "lr_3e-3"} if task == "pr" else {"lr_config"})
            assert rates[(head / "best").readlink().name] == min(rates.values())
            for name in rates:
                config = yaml.safe_load((head / name / "config.yaml").read_text())
                lr = 3e-3 if task == "asr" else float(name.removeprefix("lr_"))
                assert config["optim_conf"]["lr"] == lr
            assert json.loads((head / "best/decode/scores.json").read_text()).keys() == {
                "test_clean"
            }


def test_frozen_means_frozen(mini):
    """A head's training leaves the features it was trained on as they were, to the bit."""
    from posinv.espnet.tasks.asr import ASRTask

    recipe, _ = mini
    head = recipe.dir / "exp/seed1/laser/superb/pr/best"
    config = yaml.safe_load((head / "config.yaml").read_text())
    config["frontend_conf"]["ssl"] = str(recipe.dir / config["frontend_conf"]["ssl"])
    path = recipe.dir / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    waves = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5000, 4000])
    models = [
        ASRTask.build_model_from_file(str(path), checkpoint, "cpu")[0].eval()
        for checkpoint in (None, str(head / "valid.cer_ctc.best.pth"))
    ]
    before, after = (model.frontend.encode(waves, lengths)[0] for model in models)
    assert torch.equal(before, after)
    assert not torch.equal(models[0].frontend.weights, models[1].frontend.weights)


def test_second_run_keeps_what_is_there_and_says_so(mini):
    recipe, _ = mini
    done = recipe.run("--stage", 4, "--stop_stage", 5, *SMALL)
    assert done.returncode == 0, done.stderr
    for name in ("exp/ssl", *(f"exp/seed1/{method}" for method in SYSTEMS[1:])):
        assert f"{name}: finished already, by this command from these inputs: kept" in done.stdout
        assert f"{name}/model: exported already: kept" in done.stdout


@pytest.mark.full
def test_noise_robust_method_noisy_test_set_and_sentencepiece(mini):
    recipe, _ = mini
    done = recipe.run(
        *("--stage", 2, "--dumpdir", "dump noisy", "--expdir", "exp noisy"),
        *("--ssl_model", "exp/ssl/model", "--methods", "nrssft", "--results", "noisy.md"),
        *("--test_conditions", "clean seen", "--pr_lrs", "", "--asr_lrs", ""),
        *("--asr_token_type", "bpe", "--nbpe", 40),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "using the SSL model exp/ssl/model" in done.stdout
    assert "PER test_seen" in (recipe.dir / "noisy.md").read_text()
    tokens = (recipe.dir / "dump noisy/tokens/bpe.txt").read_text().splitlines()
    # sentencepiece's 40 count <unk>, <s> and </s>; ours <blank>, <unk> and <sos/eos>.
    assert 30 < len(tokens) <= 40
    assert any(len(token.strip("▁")) > 1 for token in tokens[2:-1])


def test_unknown_method_and_condition(recipe):
    mini = recipe("mini/ssft1")
    done = mini.run("--methods", "lazer")
    assert done.returncode != 0
    assert "conf/methods/lazer.yaml: not found" in done.stderr
    done = mini.run("--test_conditions", "loud")
    assert done.returncode != 0
    assert "--test_conditions loud: there is no loud; there are: clean seen unseen" in done.stderr
    done = mini.run("--stage", 8)
    assert done.returncode != 0
    assert "--stage 8: the last stage is 7" in done.stderr


@pytest.mark.full
def test_fsdd(recipe, shared_data):
    fsdd = recipe("fsdd/ssft1")
    (fsdd.dir / "db.sh").unlink()
    (fsdd.dir / "db.sh").write_text(f"FSDD='{shared_data / 'fsdd'}'\n")
    done = fsdd.run(
        *("--local_data_opts", "--minutes 0.5 --dev_minutes 0.1 --test_minutes 0.2"),
        *("--ssl_units", 10, "--methods", "laser", "--seeds", "1 2", "--pr_lrs", "1e-3"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "±" in (fsdd.dir / "exp/RESULTS.md").read_text()
