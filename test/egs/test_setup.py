"""A recipe for a new corpus: setup.sh, Kaldi directories, data directories as they are."""

import os
import re
import subprocess
import textwrap

import numpy as np
import pytest
import soundfile

TASKS = {"enh1": "enh.sh", "ssft1": "ssft.sh"}
SHORT = ["--stop_stage", 3, "--test_conditions", "clean seen", "--nj", 1]


def setup(checkout, task, target):
    return subprocess.run(
        [f"egs/TEMPLATE/{task}/setup.sh", target], cwd=checkout, text=True, capture_output=True
    )


@pytest.fixture
def corpus(tmp_path):
    """Kaldi directories train, dev and test, of a recording at 8 kHz with segments each."""
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "dev", "test")):
        folder = tmp_path / "my corpus" / split
        folder.mkdir(parents=True)
        soundfile.write(folder / "rec.wav", 0.1 * rng.standard_normal(8000), 8000)
        lists = {name: "" for name in ("segments", "text", "utt2spk")}
        for i in range(2):
            utt = f"spk{number}-{i}"
            lists["segments"] += f"{utt} rec {0.5 * i} {0.5 * i + 0.5}\n"
            lists["text"] += f"{utt} one two\n"
            lists["utt2spk"] += f"{utt} spk{number}\n"
        lists["wav.scp"] = f"rec {folder / 'rec.wav'}\n"
        for name, text in lists.items():
            (folder / name).write_text(text)
    (tmp_path / "my corpus" / "a lexicon.txt").write_text("ONE W AH N\nTWO T UW\n")
    return tmp_path / "my corpus"


def snapshot(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("task", TASKS)
def test_new_recipe(checkout, recipe, task):
    done = setup(checkout, task, f"egs/new_{task}/mine")
    assert done.returncode == 0, done.stderr
    assert "local/data.sh" in done.stdout
    new, known = recipe(f"new_{task}/mine"), recipe(f"an4/{task}")
    links = {path.name for path in new.dir.iterdir() if path.is_symlink()}
    assert links == {path.name for path in known.dir.iterdir() if path.is_symlink()} - {"local"}
    for name in links:
        assert (new.dir / name).readlink() == (known.dir / name).readlink()
    text = (new.dir / "run.sh").read_text()
    assert text.endswith('    "$@"\n')
    assert f'RECIPE_COMMAND="egs/new_{task}/mine/run.sh' in text
    done = new.run("--help")
    assert done.returncode == 0, done.stderr
    assert f"(default: new_{task}: " in done.stdout
    done = new.run()
    assert done.returncode != 0
    assert "error: no data/train: fill in local/data.sh, or say" in done.stderr


def test_nothing_is_overwritten_and_local_is_shared(checkout, recipe):
    assert setup(checkout, "enh1", "egs/shared/enh1").returncode == 0
    enh = recipe("shared/enh1")
    for name in ("run.sh", "local/data.sh"):
        (enh.dir / name).write_text("mine\n")
    (enh.dir / "db.sh").unlink()
    (enh.dir / "db.sh").write_text("mine\n")
    assert setup(checkout, "enh1", "egs/shared/enh1").returncode == 0
    for name in ("run.sh", "local/data.sh", "db.sh"):
        assert (enh.dir / name).read_text() == "mine\n"
    assert setup(checkout, "ssft1", "egs/shared/ssft1").returncode == 0
    assert str((recipe("shared/ssft1").dir / "local").readlink()) == "../enh1/local"


def test_bad_targets(checkout):
    for target in ("elsewhere", "egs/one", "egs/a/b/c", "egs/TEMPLATE/enh2", "egs/a b/enh1"):
        done = setup(checkout, "enh1", target)
        assert done.returncode != 0
        assert done.stderr.startswith(f"error: {target}: ")
    assert not (checkout / "elsewhere").exists()
    for options in ([], ["--help"]):
        done = subprocess.run(
            ["egs/TEMPLATE/enh1/setup.sh", *options], cwd=checkout, text=True, capture_output=True
        )
        assert "Usage: egs/TEMPLATE/<task>/setup.sh" in done.stdout
        assert (done.returncode == 0) == bool(options)


def test_kaldi_directories_are_imported_and_data_used_as_it_is(checkout, recipe, corpus):
    """Nothing is written by the user; paths have spaces; sources and brought data stay."""
    for name in ("kaldi/ssft1", "brought/ssft1"):
        assert setup(checkout, "ssft1", f"egs/{name}").returncode == 0
    kaldi = recipe("kaldi/ssft1")
    before = snapshot(corpus)
    sources = " ".join(f"--{split} '{corpus / split}'" for split in ("train", "dev", "test"))
    options = f'{sources} --lexicon "{corpus / "a lexicon.txt"}"'
    done = kaldi.run(*SHORT, "--local_data_opts", options)
    assert done.returncode != 0
    assert "sampled at 8000 Hz, not 16000 Hz" in done.stderr
    done = kaldi.run(*SHORT, "--local_data_opts", options, "--resample", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data/train: 2 utterances of 1 speaker\n" in done.stdout
    assert "data/train: 2 cut out of recordings" in done.stdout
    assert snapshot(corpus) == before
    assert (kaldi.dir / "dump/raw/test_seen/wav.scp").exists()

    brought = recipe("brought/ssft1")
    (brought.dir / "data").mkdir()
    for split in ("train", "dev", "test"):
        (kaldi.dir / "data" / split / "spk1.scp").unlink()
        wav_scp = kaldi.dir / "data" / split / "wav.scp"
        wav_scp.write_text(wav_scp.read_text().replace(" data/", f" {kaldi.dir}/data/"))
        (brought.dir / "data" / split).symlink_to(kaldi.dir / "data" / split)
    before = snapshot(kaldi.dir / "data")
    done = brought.run(*SHORT, "--resample", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data/train: there already, used as it is" in done.stdout
    assert snapshot(kaldi.dir / "data") == before
    # Without a data.sh at all.
    done = brought.run(*SHORT, "--stage", 2, "--dumpdir", "dump again", "--resample", "true")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pairs_of_noisy_and_clean_speech(checkout, recipe, tmp_path):
    """They are used as they are; noise isn't mixed into them."""
    assert setup(checkout, "enh1", "egs/pairs/enh1").returncode == 0
    pairs = recipe("pairs/enh1")
    rng = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        folder = pairs.dir / "data" / split
        folder.mkdir(parents=True)
        for name, scale in (("noisy", 0.1), ("clean", 0.05)):
            soundfile.write(
                tmp_path / f"{split}_{name}.wav", scale * rng.standard_normal(8000), 16000
            )
        lists = {"wav.scp": f"{tmp_path}/{split}_noisy.wav", "text": "ONE", "phn": "W AH N"}
        lists |= {"utt2spk": split, "spk1.scp": f"{tmp_path}/{split}_clean.wav"}
        for name, entry in lists.items():
            (folder / name).write_text(f"{split}-1 {entry}\n")
    options = ["--stop_stage", 3, "--nj", 1]
    done = pairs.run(*options)
    assert done.returncode != 0
    assert "run.sh --mix_noise false uses such pairs as they are" in done.stderr
    done = pairs.run(*options, "--mix_noise", "false")
    assert done.returncode != 0
    assert "made by mixing, which --mix_noise false forbids; there are: clean noisy" in done.stderr
    options += ["--test_conditions", "clean noisy"]
    done = pairs.run(*options, "--mix_noise", "false")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, audio in (
        *(("train", "train_clean"), ("train_noisy", "train_noisy"), ("dev_noisy", "dev_noisy")),
        *(("test_clean", "test_clean"), ("test_noisy", "test_noisy")),
    ):
        split = name.partition("_")[0]
        raw = pairs.dir / "dump" / "raw" / name
        for scp, expected in (("wav.scp", audio), ("spk1.scp", f"{split}_clean")):
            path = pairs.dir / (raw / scp).read_text().split(maxsplit=1)[1].strip()
            x, y = (soundfile.read(file)[0] for file in (path, tmp_path / f"{expected}.wav"))
            assert np.array_equal(x, y), (name, scp)


def test_readme_as_a_new_user(checkout, recipe, shared_data):
    """egs/README.md's AN4, its data.sh pasted as it stands there."""
    assert setup(checkout, "enh1", "egs/my_an4/enh1").returncode == 0
    an4 = recipe("my_an4/enh1")
    (an4.dir / "db.sh").unlink()
    sample = os.path.relpath(shared_data / "an4_sample" / "an4", an4.dir)
    (an4.dir / "db.sh").write_text(f"AN4='{sample}'\nNOISE_UNSEEN=\n")
    [block] = re.findall(r"```sh\n( +#!/.*?)```", (checkout / "egs/README.md").read_text(), re.S)
    (an4.dir / "local/data.sh").write_text(textwrap.dedent(block))
    done = an4.run("--stop_stage", 3, "--nj", 1)
    assert done.returncode != 0
    assert "unknown phn token" in done.stderr
    done = an4.run("--stop_stage", 3, "--nj", 1, "--token_sets", "train dev test")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (an4.dir / "data/test/text").read_text()
    assert text.splitlines()[1] == "mmxg-cen8-b OCTOBER TWENTY FOUR NINETEEN SEVENTY"
    assert (an4.dir / "data/dev/utt2spk").read_text() == "fbbh-cen8-b fbbh\n"
    assert len((an4.dir / "data/train/phn").read_text().splitlines()) == 4


def test_unbalanced_quotes(checkout, recipe):
    assert setup(checkout, "ssft1", "egs/quotes/ssft1").returncode == 0
    done = recipe("quotes/ssft1").run("--local_data_opts", "--train 'a b", *SHORT)
    assert done.returncode != 0
    assert "quote" in done.stderr


def test_run_sh_started_in_other_ways(checkout, tmp_path):
    """A link to it works; sh, where that is not bash, is told so."""
    script = checkout / "egs/mini/enh1/run.sh"
    link = tmp_path / "a link.sh"
    link.symlink_to(script)
    done = subprocess.run([link, "--stage", "77"], text=True, capture_output=True)
    assert done.stderr == "error: --stage 77: the last stage is 9\n"
    done = subprocess.run(["dash", script, "--stage", "77"], text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {script} needs bash: start it as ./run.sh\n"
