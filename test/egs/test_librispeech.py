"""The papers' recipes, whole, at toy size: their corpora come from a server on this machine.

LibriSpeech, its lexicons, DEMAND and the released DEMUCS are small, of FSDD's digits and AN4's
noises, in the layouts and under the names of the real ones.
"""

import hashlib
import json
import re
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from posinv.corpora.demand import SEEN, UNSEEN
from posinv.espnet.separator import DemucsSeparator
from posinv.report.results import BEGIN, END

ROOT = Path(__file__).resolve().parents[2]
LEXICON = {
    **{"ZERO": "Z IY1 R OW0", "ONE": "W AH1 N", "TWO": "T UW1", "THREE": "TH R IY1"},
    **{"FOUR": "F AO1 R", "FIVE": "F AY1 V", "SIX": "S IH1 K S", "SEVEN": "S EH1 V AH0 N"},
    **{"EIGHT": "EY1 T", "NINE": "N AY1 N"},
}
DIGITS = list(LEXICON)
# subset: speakers, digits of each utterance. All digits are in the training set.
SUBSETS = {
    "train-clean-100": ({103: "george", 1034: "jackson"}, ["0123", "456", "789", "012"]),
    "dev-clean": ({1272: "nicolas"}, ["370", "15"]),
    "test-clean": ({1089: "lucas"}, ["926", "48"]),
}
MASTER64 = "master64-8a5dfb4bb92753dd.th"
HEAD = {"num_iters_per_epoch": 2, "batch_size": 2}
SSFT = {
    "model_conf": {"projection_size": 16},
    "scheduler_conf": {"total_steps": 3},
    "num_iters_per_epoch": 3,
    "batch_size": 2,
}
SEPARATOR = {"separator_conf": {"hidden": 4, "depth": 2}}
TOY = {
    "laser_hubert": SSFT,
    "nrssft_hubert": SSFT,
    "superb/pr": {**HEAD, "encoder_conf": {"output_size": 16}},
    "superb/asr": {
        **HEAD,
        "preencoder_conf": {"input_size": 32, "output_size": 16},
        "encoder_conf": {"hidden_size": 16},
    },
    "master64/enh": SEPARATOR,
    "master64/finetune": {"batch_size": 2},
}


def make_librispeech(top: Path, fsdd: Path) -> None:
    for subset, (speakers, utterances) in SUBSETS.items():
        for speaker, name in speakers.items():
            chapter = top / "LibriSpeech" / subset / str(speaker) / "1240"
            chapter.mkdir(parents=True)
            lines = []
            for number, digits in enumerate(utterances):
                utt = f"{speaker}-1240-{number:04}"
                take = [fsdd / f"{digit}_{name}_{number}.wav" for digit in digits]
                speech = np.concatenate([soundfile.read(path)[0] for path in take])
                speech = np.clip(soxr.resample(speech, 8000, 16000), -1, 1)
                soundfile.write(chapter / f"{utt}.flac", speech, 16000)
                lines.append(f"{utt} {' '.join(DIGITS[int(digit)] for digit in digits)}\n")
            (chapter / f"{speaker}-1240.trans.txt").write_text("".join(lines))


def make_demand(top: Path, recordings: list[Path]) -> None:
    for seed, name in enumerate((*SEEN, *UNSEEN)):
        (top / name).mkdir(parents=True)
        rate = 48000 if name == "SCAFE" else 16000
        noise = np.roll(soundfile.read(recordings[seed % len(recordings)])[0], 1000 * seed)
        noise = 0.8 * np.clip(soxr.resample(noise, 16000, rate), -1, 1)
        for channel in (1, 2):
            soundfile.write(top / name / f"ch{channel:02}.wav", noise / channel, rate)


def make_quesst14(top: Path, fsdd: Path) -> None:
    """QUESST 2014's layout: queries of single digits; the digit nine is in another language."""
    scoring = top / "scoring"
    documents = {f"quesst14_{number:05}": text for number, text in enumerate(["012", "34", "9"])}

    def write(folder: str, texts: dict[str, str], speaker: str, key: str) -> None:
        (top / folder).mkdir(parents=True)
        lines = []
        for name, digits in texts.items():
            take = [soundfile.read(fsdd / f"{digit}_{speaker}_6.wav")[0] for digit in digits]
            soundfile.write(top / folder / f"{name}.wav", np.concatenate(take), 8000)
            language = "czech" if digits == "9" else "nnenglish"
            lines.append(f"quesst14Database/{folder}/{name}.wav {language}\n")
        scoring.mkdir(exist_ok=True)
        (scoring / f"language_key_{key}.lst").write_text("".join(lines))

    write("Audio", documents, "george", "utterances")
    for split in ("dev", "eval"):
        queries = {f"quesst14_{split}_{n:04}": digit for n, digit in enumerate("139")}
        write(f"{split}_queries", queries, "lucas", split)
        truth = scoring / f"groundtruth_quesst14_{split}"
        truth.mkdir()
        lines = [
            f"LEXEME {document} 1 0.00 1.00 {query} lex <NA> <NA>\n"
            for query, digit in queries.items()
            for document, digits in documents.items()
            if digit in digits
        ]
        (truth / f"quesst14_{split}.rttm").write_text("".join(lines))


@pytest.fixture(scope="module")
def served(tmp_path_factory, shared_data):
    """A folder of everything that data.sh downloads, one folder a site."""
    made, top = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("served")
    make_librispeech(made, shared_data / "fsdd" / "recordings")
    (top / "12").mkdir()
    for subset in SUBSETS:
        with tarfile.open(top / "12" / f"{subset}.tar.gz", "w:gz") as archive:
            archive.add(made / "LibriSpeech" / subset, f"LibriSpeech/{subset}")
    (top / "lexicon").mkdir()
    for part, words in {"200k": DIGITS[:7], "allothers": DIGITS[7:]}.items():
        path = top / "lexicon" / f"librispeech-lexicon-{part}-g2p.txt"
        path.write_text("".join(f"{word}\t{LEXICON[word]}\n" for word in words))
    make_demand(made / "demand", sorted((shared_data / "an4_sample" / "noise").glob("*.wav")))
    (top / "1227121").mkdir()
    for folder in (made / "demand").iterdir():
        rate = "48k" if folder.name == "SCAFE" else "16k"
        with zipfile.ZipFile(top / "1227121" / f"{folder.name}_{rate}.zip", "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, f"{folder.name}/{path.name}")
    make_quesst14(made / "quesst14", shared_data / "fsdd" / "recordings")
    (top / "files").mkdir()
    with tarfile.open(top / "files" / "quesst14Database.tgz", "w:gz") as archive:
        archive.add(made / "quesst14", "quesst14Database")
    (top / "denoiser").mkdir()
    torch.manual_seed(0)
    state = DemucsSeparator(1, **SEPARATOR["separator_conf"]).state_dict()
    torch.save(state, top / "denoiser" / MASTER64)
    return top


@pytest.fixture(scope="module")
def server(served):
    """Serves ``served``, breaking off each file named in ``breaks`` once, half-way."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = (served / self.path.lstrip("/")).read_bytes()
            start = int(re.sub(r"\D", "", self.headers["Range"] or "0"))
            self.server.requests.append((Path(self.path).name, start))
            self.send_response(206 if start else 200)
            if start:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", span)
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = len(content)
            if Path(self.path).name in self.server.breaks:
                self.server.breaks.remove(Path(self.path).name)
                stop //= 2
            self.wfile.write(content[start:stop])

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.breaks = [], {"train-clean-100.tar.gz"}
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def write_db(checkout: Path, server, checksums: Path) -> None:
    """Let the recipes' db.sh name the server's sites and a list of checksums."""
    original = (ROOT / "egs/TEMPLATE/db.sh").read_text()
    url = f"http://127.0.0.1:{server.server_port}"
    lines = [
        f"LIBRISPEECH_URL={url}/12",
        f"LIBRISPEECH_LEXICON_URL={url}/lexicon",
        f"DEMAND_URL={url}/1227121",
        f"MASTER64_URL={url}/denoiser",
        f"QUESST14_URL={url}/files",
        f"CHECKSUMS='{checksums}'",
    ]
    (checkout / "egs/TEMPLATE/db.sh").write_text(original + "\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def toy(checkout, shrink_config, served, server, tmp_path_factory):
    """The checkout with toy configurations, a small SSL model, and db.sh on the server.

    DOWNLOADS stays the recipes' own; the checksums are those of what is served.
    """
    for name, changes in TOY.items():
        shrink_config(checkout / "conf" / f"{name}.yaml", changes)
    torch.manual_seed(1)
    ssl = tmp_path_factory.mktemp("an ssl") / "model"
    HubertModel(HubertConfig(**TINY_SSL)).save_pretrained(ssl)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(ssl)
    digests = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for folder in ("12", "1227121", "files", "denoiser")
        for path in (served / folder).iterdir()
    }
    return {"checkout": checkout, "ssl": ssl, "digests": digests, "top": ssl.parent}


def write_checksums(toy: dict, changes: dict[str, str]) -> Path:
    path = toy["top"] / "check sums.txt"
    sums = {name: f"md5:{digest}" for name, digest in toy["digests"].items()} | changes
    path.write_text("# of a test\n" + "".join(f"{name} {sums[name]}\n" for name in sums))
    return path


@pytest.fixture(scope="module")
def refused(toy, recipe, server):
    """Stage 1 with a wrong checksum of dev-clean."""
    wrong = write_checksums(toy, {"dev-clean.tar.gz": "md5:" + "0" * 32})
    write_db(toy["checkout"], server, wrong)
    return recipe("librispeech/ssft1").run("--stop_stage", 1)


@pytest.fixture(scope="module")
def ssft(toy, recipe, server, refused):
    """The SSFT recipe after a whole run."""
    write_checksums(toy, {})
    recipe = recipe("librispeech/ssft1")
    done = recipe.run(
        *("--ssl_model", toy["ssl"], "--pr_lrs", "5e-4", "--train_nj", 2),
        *("--config", "conf/qbe.yaml", "--local_data_opts", "--demand true --quesst14 true"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, done.stdout


@pytest.fixture(scope="module")
def enh(toy, recipe, served, ssft):
    """The enhancement recipe after a whole run; the released model has a checksum of 16 digits."""
    digest = hashlib.sha256((served / "denoiser" / MASTER64).read_bytes()).hexdigest()
    write_checksums(toy, {MASTER64: f"sha256:{digest[:16]}"})
    recipe = recipe("librispeech_demand/enh1")
    done = recipe.run(
        *("--ssl_model", toy["ssl"], "--pr_lrs", "5e-4", "--train_nj", 2),
        *("--criteria", "ssl_softdtw"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, done.stdout


@pytest.mark.full
def test_wrong_checksum_is_refused(refused, recipe, server, ssft):
    assert refused.returncode != 0
    [line] = [line for line in refused.stderr.splitlines() if "error: " in line]
    assert "dev-clean.tar.gz" in line
    assert "not md5:" + "0" * 32 in line
    # What came whole before is not asked for again, what was refused is.
    names = [name for name, _ in server.requests]
    assert names.count("dev-clean.tar.gz") == 2
    assert "train-clean-100.tar.gz was unpacked there already" in ssft[1]


@pytest.mark.full
def test_broken_download_goes_on_where_it_broke(refused, server, served):
    size = (served / "12/train-clean-100.tar.gz").stat().st_size
    starts = [start for name, start in server.requests if name == "train-clean-100.tar.gz"]
    assert starts == [0, size // 2]


@pytest.mark.full
def test_data(ssft):
    recipe, _ = ssft
    text = (recipe.dir / "data/train/text").read_text()
    assert text.startswith("103-1240-0000 ZERO ONE TWO THREE\n103-1240-0001 FOUR FIVE SIX\n")
    # One word from each lexicon.
    phones = (recipe.dir / "data/test/phn").read_text()
    assert phones.startswith("1089-1240-0000 N AY1 N T UW1 S IH1 K S\n")


@pytest.mark.full
def test_table_has_the_published_figures_beside_ours(ssft):
    recipe, output = ssft
    text = (recipe.dir / "exp/hubert/RESULTS.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in rows[0].strip("|").split(" | ")]
    assert header[:3] == ["SSL model", "PER test_clean", "published"]
    assert [row.split("|")[3].strip() for row in rows[2:4]] == ["", "-8.2 % relative"]
    assert "Published: laser_hubert, PER test_clean: -8.2 % relative (abstract of" in text
    assert all(row in output for row in rows)


@pytest.mark.full
def test_queries_of_quesst14_are_searched(ssft):
    """The English ones, two in two documents; the third, which counts, is missed."""
    recipe, _ = ssft
    text = (recipe.dir / "exp/hubert/RESULTS.md").read_text()
    assert re.search(r"^\| SSL model +\| quesst14_eval \|$", text, re.MULTILINE)
    for system in ("base", "laser_hubert"):
        scores = json.loads((recipe.dir / f"exp/hubert/seed1/{system}/qbe/scores.json").read_text())
        assert (scores["quesst14_eval"]["queries"], scores["quesst14_eval"]["documents"]) == (3, 3)
        assert 0 <= scores["quesst14_eval"]["mtwv"] < 0.7


@pytest.mark.full
def test_preset_is_the_whole_configuration(ssft):
    recipe, _ = ssft
    training = recipe.dir / "exp/hubert/seed1/laser_hubert"
    config = yaml.safe_load((training / "config.yaml").read_text())
    preset = yaml.safe_load((ROOT / "conf/laser_hubert.yaml").read_text())
    for name in ("alpha", "margin", "gamma", "window", "trainable_layers"):
        assert config["model_conf"][name] == preset["model_conf"][name]
    assert config["optim_conf"] == preset["optim_conf"] | config["optim_conf"]
    assert (training / "model/model.safetensors").exists()
    # No method asked for noise.
    assert not (recipe.dir / "data/noise").exists()


@pytest.mark.full
def test_noise_robust_variant(toy, ssft):
    recipe, _ = ssft
    options = ["--ssl_model", toy["ssl"], "--methods", "nrssft_hubert"]
    done = recipe.run("--stage", 2, "--stop_stage", 5, "--skip_stages", "3 4", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = (recipe.dir / "data/noise/wav.scp").read_text().split()
    assert sorted(listed[::2]) == sorted(SEEN)


@pytest.mark.full
def test_released_model_with_other_first_digits_is_refused(toy, recipe, ssft):
    write_checksums(toy, {MASTER64: "sha256:8a5dfb4bb92753dd"})
    recipe = recipe("librispeech_demand/enh1")
    done = recipe.run("--demand", "false", script="local/data.sh")
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert MASTER64 in line and "not sha256:8a5dfb4bb92753dd: removed" in line
    downloads = toy["checkout"] / "egs/librispeech/ssft1/downloads"
    assert not (downloads / MASTER64).exists()
    assert not (recipe.dir / "data/master64.th").exists()


@pytest.mark.full
def test_se_starts_from_the_released_model(enh, served):
    recipe, _ = enh
    released = torch.load(served / "denoiser" / MASTER64, weights_only=True)
    imported = torch.load(recipe.dir / "exp/enh/valid.loss.best.pth", weights_only=True)
    assert all(torch.equal(imported[f"separator.{key}"], released[key]) for key in released)


@pytest.mark.full
def test_noise_is_demands_and_the_draw_follows_the_utterance_alone(enh):
    recipe, _ = enh
    for condition, names in (("seen", SEEN), ("unseen", UNSEEN)):
        lines = (recipe.dir / f"data/test_{condition}/manifest.tsv").read_text().splitlines()
        header, *rows = [line.split("\t") for line in lines]
        for row in rows:
            drawn = dict(zip(header, row, strict=True))
            assert drawn["noise"] == "recorded"
            path = Path(drawn["noise_source"].rpartition("@")[0])
            assert path.parent == Path("data/demand") / condition
            assert path.stem in names
            assert float(drawn["snr_db"]) in (5, 10, 20)
    before = (recipe.dir / "data/test_seen/manifest.tsv").read_bytes()
    shutil.rmtree(recipe.dir / "data/test_seen")
    done = recipe.run("--stage", 2, "--stop_stage", 2, "--nj", 1)
    assert done.returncode == 0, done.stderr
    assert (recipe.dir / "data/test_seen/manifest.tsv").read_bytes() == before


@pytest.mark.full
def test_se_table(enh, server):
    recipe, output = enh
    text = (recipe.dir / "exp/RESULTS.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for system in ("noisy input", "before fine-tuning", "ssl_softdtw"):
        assert sum(row.split("|")[1].strip() == system for row in rows) == 3
    for name in ("test_clean", "test_seen", "test_unseen", "SI-SDR"):
        assert any(name in row for row in rows)
    assert "Enhancement, mean of test_seen and test_unseen" in text
    assert all(row in output for row in rows)
    for task in ("pr", "asr"):
        best = recipe.dir / "exp/seed1/ssl_softdtw/superb" / task / "best"
        scores = json.loads((best / "decode/scores.json").read_text())
        assert set(scores) == {"test_clean", "test_seen", "test_unseen"}
    # The other recipe's downloads are used.
    names = [name for name, _ in server.requests]
    assert names.count("test-clean.tar.gz") == names.count("SCAFE_48k.zip") == 1


@pytest.mark.full
def test_folders_that_the_user_has(toy, enh, recipe, served, server):
    """No download, and what is missing named in one line."""
    downloads = toy["checkout"] / "egs/librispeech/ssft1/downloads"
    recipe = recipe("librispeech_demand/enh1")
    lines = [
        f"LIBRISPEECH='{downloads / 'LibriSpeech'}'",
        f"LIBRISPEECH_LEXICON=('{served}/lexicon/librispeech-lexicon-200k-g2p.txt'"
        f" '{served}/lexicon/librispeech-lexicon-allothers-g2p.txt')",
        f"DEMAND='{downloads / 'DEMAND'}'",
        f"MASTER64='{served}/denoiser/{MASTER64}'",
        "NOISE_SEEN=data/demand/seen NOISE_UNSEEN=data/demand/unseen DOWNLOADS=/nonexistent",
    ]
    db = recipe.dir / "db.sh"
    db.unlink()
    db.write_text("\n".join(lines) + "\n")
    asked = len(server.requests)
    before = (recipe.dir / "data/train/phn").read_text()
    done = recipe.run("--stop_stage", 1)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) == asked
    assert (recipe.dir / "data/train/phn").read_text() == before
    assert (recipe.dir / "data/master64.th").resolve() == served / "denoiser" / MASTER64

    for wrong, said in (
        ("LIBRISPEECH=/nonexistent", "/nonexistent/train-clean-100: not found: LIBRISPEECH"),
        ("DEMAND=/nonexistent", "no ch01.wav of DKITCHEN"),
        ("MASTER64=/nonexistent", "/nonexistent: not found: MASTER64"),
    ):
        db.write_text("\n".join([*lines, wrong]) + "\n")
        done = recipe.run("--stop_stage", 1)
        assert done.returncode != 0
        [line] = [line for line in done.stderr.splitlines() if "error: " in line]
        assert said in line

    db.write_text("\n".join([*lines, "NOISE_SEEN="]) + "\n")
    done = recipe.run("--stage", 2)
    assert done.returncode != 0
    assert "NOISE_SEEN in db.sh: empty, and --recorded_noise only needs it" in done.stderr


def test_committed_results_can_be_filled_in():
    files = sorted(ROOT.glob("egs/librispeech*/*/RESULTS*.md"))
    assert len(files) == 4
    for path in files:
        text = path.read_text()
        assert text.count(BEGIN) == text.count(END) == 1
        assert text.index(BEGIN) < text.index(END)
