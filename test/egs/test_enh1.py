"""The enhancement recipes, whole, at toy size, through their own run.sh."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MINI = [
    *("--local_data_opts", "--minutes 1 --dev_minutes 0.1 --test_minutes 0.15"),
    *("--ssl_units", 10, "--criteria", "ssl_softdtw"),
]
SYSTEMS = ["noisy input", "before fine-tuning", "ssl_softdtw"]
SETS = ["clean", "seen", "unseen", "shift", "rate"]


@pytest.fixture(scope="module")
def mini(recipe):
    """The mini recipe after a whole run."""
    mini = recipe("mini/enh1")
    done = mini.run(*MINI)
    assert done.returncode == 0, done.stdout + done.stderr
    return mini, done.stdout


def test_table(mini):
    recipe, output = mini
    rows = recipe.table(output)
    for system in SYSTEMS:
        assert sum(row.split("|")[1].strip() == system for row in rows) == 3  # PER, WER, signal
    for name in [*SETS, "SI-SDR", "STOI", "PESQ"]:
        assert any(name in row for row in rows)
    text = (recipe.dir / "exp/RESULTS.md").read_text()
    assert text.startswith(
        "# mini: enhancement fine-tuned through a small SSL model, synthetic speech\n"
    )


def test_one_line_a_stage_with_its_time(mini):
    recipe, output = mini
    recipe.check_stages(output, last=9)


def test_report_has_audio_alignments_and_times(mini):
    recipe, _ = mini
    text = (recipe.dir / "exp" / "report.html").read_text()
    assert "This report is not complete" not in text
    for section in ("Convergence", "Listen", "Alignment", "Layers", "Time"):
        assert f"<h2>{section}</h2>" in text
    # Clean, noisy, before and after fine-tuning, in three of the test sets.
    assert text.count("<audio ") == 4 * 3
    stages = (recipe.dir / "exp" / "stages.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in stages[1:10]] == [str(k) for k in range(1, 10)]


def test_tensorboard_shows_what_fine_tuning_does(mini):
    recipe, _ = mini
    shown = EventAccumulator(str(recipe.dir / "exp/seed1/ssl_softdtw/tensorboard/train"))
    shown.Reload()
    assert shown.Images("alignment/distance, soft alignment")


def test_every_test_set_is_scored(mini):
    recipe, _ = mini
    for system in ("noisy", "enh", "ssl_softdtw"):
        for task in ("pr", "asr"):
            best = recipe.dir / "exp" / "seed1" / system / "superb" / task / "best"
            assert set(json.loads((best / "decode" / "scores.json").read_text())) == {
                f"test_{name}" for name in SETS
            }


def test_second_run_keeps_what_is_there_and_says_so(mini):
    recipe, _ = mini
    checkpoint = recipe.dir / "exp" / "enh" / "1epoch.pth"
    before = checkpoint.stat().st_mtime_ns
    done = recipe.run("--stage", 5, "--stop_stage", 5)
    assert done.returncode == 0, done.stderr
    assert "exp/enh: finished already, by this command from these inputs: kept" in done.stdout
    assert checkpoint.stat().st_mtime_ns == before


def test_other_options_in_the_same_directory_are_refused(mini):
    recipe, _ = mini
    done = recipe.run("--stage", 5, "--stop_stage", 5, "--enh_config", "conf/finetune.yaml")
    assert done.returncode != 0
    assert "exp/enh was made by another training: " in done.stderr


def test_checkpoint_of_another_shape(mini):
    recipe, _ = mini
    done = recipe.run(
        "--stage",
        5,
        "--stop_stage",
        5,
        "--expdir",
        "exp other",
        "--enh_checkpoint",
        "exp/seed1/noisy/superb/pr/best/valid.cer_ctc.best.pth",
    )
    assert done.returncode != 0
    assert "exp other/enh/import.log" in done.stderr
    assert "enh_import: error: " in done.stderr
    assert not (recipe.dir / "exp other" / "enh" / "valid.loss.best.pth").exists()


@pytest.mark.full
def test_starts_from_a_given_ssl_model_and_checkpoint(mini):
    recipe, _ = mini
    enh = recipe.dir / "exp" / "enh" / "valid.loss.best.pth"
    state = torch.load(enh, weights_only=True)
    bare = {key.removeprefix("separator."): value for key, value in state.items()}
    torch.save(bare, recipe.dir / "released.th")
    done = recipe.run(
        "--stage",
        4,
        "--stop_stage",
        6,
        "--expdir",
        "exp released",
        "--ssl_model",
        "exp/ssl/model",
        "--enh_checkpoint",
        "released.th",
        "--criteria",
        "ssl_mse",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "using the SSL model exp/ssl/model" in done.stdout
    assert (recipe.dir / "exp released" / "seed1" / "ssl_mse" / "valid.loss.best.pth").exists()
    imported = torch.load(
        recipe.dir / "exp released" / "enh" / "valid.loss.best.pth", weights_only=True
    )
    assert all(torch.equal(imported[key], state[key]) for key in state)


def test_enhances_in_parts(mini):
    recipe, _ = mini
    out = recipe.dir / "exp" / "seed1" / "ssl_softdtw" / "enhanced"

    def enhanced():
        entries = [line.split(" ", 1) for line in (out / "spk1.scp").read_text().splitlines()]
        return {name: soundfile.read(path)[0] for name, path in entries}

    whole = enhanced()
    options = ("--stage", 7, "--stop_stage", 7, "--inference_nj", 2)
    done = recipe.run(*options, "--criteria", "ssl_softdtw")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = enhanced()
    assert list(parts) == list(whole)
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)
    assert sorted(path.name for path in out.glob("part*")) == ["part.sh", "part1", "part2"]


def test_heads_of_a_system_are_trained_by_one_command(mini):
    """Each head's folder is as asr_train leaves it; a learning rate more keeps what is there."""
    recipe, _ = mini
    superb = recipe.dir / "exp/seed1/noisy/superb"
    before = (superb / "pr/lr_config/1epoch.pth").stat().st_mtime_ns
    options = ("--stage", 8, "--stop_stage", 8, "--criteria", "", "--pr_lrs", "3e-3 1e-3")
    done = recipe.run(*options, *("--sweep_updates", 1, "--cache_dir", "layers"))
    assert done.returncode != 0
    assert (
        "superb was made by another training: --cache_dir: none there, layers now; " in done.stderr
    )
    done = recipe.run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    for head in ("lr_3e-3: a head now", "lr_1e-3: a head now", "lr_config: none now"):
        assert f"--head exp/seed1/noisy/superb/pr/{head}: the training goes on" in done.stdout
    assert (superb / "pr/lr_config/1epoch.pth").stat().st_mtime_ns == before
    assert json.loads((superb / "pr/best.json").read_text()).keys() == {"lr_3e-3", "lr_1e-3"}
    # 3e-3 is what the configuration has: with the same seed, the same head.
    states = [
        torch.load(superb / f"pr/{name}/1epoch.pth", weights_only=True)
        for name in ("lr_config", "lr_3e-3")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.full
def test_killed_decoding_resumes(mini):
    """Killed while it decodes, it goes on."""
    recipe, _ = mini
    superb = recipe.dir / "exp/seed1/enh/superb"
    texts = {task: (superb / task / "best/decode/text").read_text() for task in ("pr", "asr")}
    options = ["--stage", "8", "--stop_stage", "8", "--criteria", "", "--inference_nj", "2"]
    command = [recipe.dir / "run.sh", *options]
    process = subprocess.Popen(command, start_new_session=True)
    part = superb / "decode" / "part2"
    # The one part there is now makes room for two.
    while not part.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert not (part / "done").exists()
    done = recipe.run(*options)
    assert done.returncode == 0, done.stderr
    assert (part / "done").exists()
    for task, text in texts.items():
        assert (superb / task / "best/decode/text").read_text() == text


BAD_AUDIO = {
    "missing": (Path.unlink, "no such audio file"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "not audio": (
        lambda path: path.write_text("hello " * 100),
        "not audio that soundfile can read",
    ),
    "wrong rate": (lambda path: soundfile.write(path, np.zeros(8000), 8000), "8000 Hz"),
    "too short": (lambda path: soundfile.write(path, np.zeros(399), 16000), "399"),
}


@pytest.fixture
def bad(recipe, mini, tmp_path):
    """The mini recipe's data, to be spoiled; restored after."""
    recipe, _ = mini
    shutil.copytree(recipe.dir / "data", tmp_path / "data", symlinks=True)
    yield recipe
    shutil.rmtree(recipe.dir / "data")
    shutil.copytree(tmp_path / "data", recipe.dir / "data", symlinks=True)


@pytest.mark.parametrize("case", BAD_AUDIO)
def test_bad_audio(bad, case):
    edit, message = BAD_AUDIO[case]
    line = (bad.dir / "data" / "dev" / "wav.scp").read_text().splitlines()[0]
    name, path = line.split(" ", 1)
    edit(bad.dir / path)
    done = bad.run("--stage", 3, "--stop_stage", 3, "--dumpdir", "dump bad")
    assert done.returncode != 0
    assert "stage 3" in done.stderr
    errors = [text for text in done.stderr.splitlines() if text.startswith("format_data: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert name in errors[0] or path in errors[0]
    assert not (bad.dir / "dump bad" / "raw" / "dev").exists()


BAD_LISTS = {
    "no transcript": (lambda lines: lines[1:], "text", "no transcript for utterance"),
    "unknown token": (lambda lines: [lines[0] + " café", *lines[1:]], "text", "é"),
    "duplicated id": (lambda lines: [lines[0], *lines], "wav.scp", "duplicated id"),
    "lists don't match": (lambda lines: lines[1:], "spk1.scp", "don't match"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists(bad, case):
    edit, name, message = BAD_LISTS[case]
    path = bad.dir / "data" / "dev" / name
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    done = bad.run("--stage", 3, "--stop_stage", 3, "--dumpdir", "dump bad")
    assert done.returncode != 0
    errors = [text for text in done.stderr.splitlines() if "_data: error: " in text]
    assert len(errors) == 1
    assert message in errors[0]


def test_unknown_layer(mini, checkout):
    recipe, _ = mini
    criterion = checkout / "conf" / "small" / "criteria" / "deep.yaml"
    criterion.write_text(
        "[{name: ssl_mse, conf: {layer: 99}, wrapper: fixed_order, wrapper_conf: {weight: 1.0}}]"
    )
    done = recipe.run("--stage", 6, "--stop_stage", 6, "--criteria", "deep")
    assert done.returncode != 0
    assert "layer 99 is out of range: this SSL model has hidden states 0 to 2" in done.stderr


def test_unknown_criterion(mini):
    recipe, _ = mini
    done = recipe.run("--criteria", "ssl_mze")
    assert done.returncode != 0
    assert "conf/criteria/ssl_mze.yaml: not found" in done.stderr


def test_stale_results_are_refused(mini):
    """Other noise under the same names and of the same lengths; the last test that uses the run."""
    recipe, _ = mini
    done = recipe.run("--stage", 2, "--noise_seed", 1, *MINI)
    assert done.returncode != 0
    assert (
        "exp/enh was made by another training: dump/raw/dev_noisy/utt2digest: another content "
        "there, changed now; dump/raw/train_noisy/utt2digest: another content" in done.stderr
    )
    # The speech is the same, and so is the SSL model made from it.
    assert "exp/ssl: finished already, by this command from these inputs: kept" in done.stdout
    done = recipe.run("--stage", 9, *MINI)
    assert done.returncode != 0
    assert "changed after this was made: run the earlier stages again" in done.stderr


@pytest.mark.full
def test_fsdd(recipe, shared_data):
    fsdd = recipe("fsdd/enh1")
    (fsdd.dir / "db.sh").unlink()
    (fsdd.dir / "db.sh").write_text(
        f"FSDD='{shared_data / 'fsdd'}'\nNOISE_UNSEEN='{shared_data / 'an4_sample' / 'noise'}'\n"
    )
    done = fsdd.run(
        "--local_data_opts",
        "--minutes 0.5 --dev_minutes 0.1 --test_minutes 0.2",
        "--ssl_units",
        10,
        "--criteria",
        "ssl_softdtw",
        "--seeds",
        "1 2",
        "--qbe",
        "true",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (fsdd.dir / "exp/RESULTS.md").read_text()
    assert "±" in text
    assert "MTWV" in text
    for seed, link in (("1", False), ("2", True)):
        qbe = fsdd.dir / "exp" / f"seed{seed}"
        assert (qbe / "noisy/qbe").is_symlink() == (qbe / "enh/qbe").is_symlink() == link
        assert (qbe / "ssl_softdtw/qbe/scores.json").exists()
    assert "recorded" in (fsdd.dir / "data" / "test_unseen" / "manifest.tsv").read_text()
