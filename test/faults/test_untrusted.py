"""What comes from elsewhere runs nothing and goes nowhere that it shouldn't.

tools/mutation_check.py takes each of these guards out, and sees that a test here fails.
"""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel

from posinv.bin.recipe_options import read_options
from posinv.corpora import download as downloads
from posinv.corpora.download import download, extract
from posinv.corpora.imported import import_cuts
from posinv.corpora.lexicon import Lexicon
from posinv.data.audio import read_audio
from posinv.data.checkpoint import read_checkpoint
from posinv.data.files import read_yaml
from posinv.data.units import load_units_model, save_units_model
from posinv.errors import InputError
from posinv.inference.enhancer import plan_enhancement
from posinv.models.demucs import Demucs
from posinv.report.results import markdown_table, provenance
from posinv.ssl.load import load_config, load_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "egs" / "TEMPLATE" / "scripts"
SECRET = "hf_SeCrEtSeCrEtSeCrEt"


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def evil(tmp_path):
    """A thing to be pickled; where it was unpickled in spite of all, the test fails."""
    yield Evil(tmp_path / "pwned")
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------ pickles


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_checkpoints(tmp_path, evil, form, monkeypatch):
    path = tmp_path / "x.th"
    state = {"encoder.0.0.weight": torch.zeros(1), "x": evil}
    if form == "bare":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    # not even where variables allow it
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for read in (read_checkpoint, lambda path: Demucs(hidden=4, depth=2, checkpoint=path)):
        with pytest.raises(InputError, match=r"x\.th: not (tensors alone|a checkpoint)"):
            read(path)


def test_k_means_files(tmp_path, evil):
    path = tmp_path / "units.npz"
    centres = np.array([evil], dtype=object)
    np.savez(path, centres=centres)
    with pytest.raises(InputError, match=r"units\.npz: not a k-means file"):
        load_units_model(path)
    for content in (b"", b"PK\3\4", pickle.dumps(evil), b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"units\.npz: not a k-means file"):
            load_units_model(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(InputError, match=r"units\.npz: not a k-means file"):
        load_units_model(path)
    save_units_model(path, np.zeros((2, 3), np.float32))
    assert load_units_model(path).shape == (2, 3)


def test_archives_of_kaldi(tmp_path, evil):
    buffer = io.BytesIO()
    np.save(buffer, np.array([evil], dtype=object))
    (tmp_path / "x.ark").write_bytes(b"utt " + buffer.getvalue())
    with pytest.raises(InputError, match="not a kaldiio entry"):
        read_audio(f"{tmp_path}/x.ark:4", 16000)
    assert kaldiio.__name__


@pytest.fixture
def ssl(tmp_path):
    folder = tmp_path / "ssl"
    HubertModel(HubertConfig(**TINY_SSL)).save_pretrained(folder)
    return folder


def test_weights_of_an_ssl_model(tmp_path, ssl, evil, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (ssl / "model.safetensors").unlink()
    torch.save({"masked_spec_embed": torch.zeros(32), "x": evil}, ssl / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"ssl: its weights cannot be loaded") as error:
        load_model(ssl, load_config(ssl))
    assert "\n" not in str(error.value)
    for content in (b"", b"PK\3\4", b"\x10" * 100):
        (ssl / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"ssl: its weights cannot be loaded"):
            load_model(ssl, load_config(ssl))


@pytest.mark.parametrize("known", [True, False])
def test_models_with_code_of_their_own(tmp_path, ssl, evil, known, monkeypatch):
    """An answer of "y" at a terminal would not run it either."""
    config = json.loads((ssl / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    if not known:
        config["model_type"] = "evil"
    (ssl / "config.json").write_text(json.dumps(config))
    (ssl / "code.py").write_text(
        f"import os\nos.mkdir({str(evil.path)!r})\nConfig = Model = object\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if known:  # transformers' own code for it
        assert type(load_model(ssl, load_config(ssl))) is HubertModel
    else:
        with pytest.raises(InputError, match=r"ssl: neither a local folder"):
            load_config(ssl)


@pytest.mark.parametrize(
    "config",
    ["[1]", "{", '{"model_type": "hubert", "hidden_size": "x"}', '{"model_type": []}', "null",
     '{"model_type": "hubert", "conv_kernel": 3}',
     '{"model_type": "hubert", "num_hidden_layers": -1}',
    ],
)  # fmt: skip
def test_damaged_configurations(ssl, config):
    (ssl / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"SSL model .*ssl: ") as error:
        load_model(ssl, load_config(ssl))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- YAML and options


@pytest.mark.parametrize(
    "text",
    [
        "x: !!python/object/apply:os.mkdir [{path}]",
        "x: !!python/object/new:os.mkdir [{path}]",
        "x: !!python/name:os.system",
        "!!python/module:os {{}}",
    ],
)
def test_yaml_tags(tmp_path, evil, text):
    path = tmp_path / "x.yaml"
    path.write_text(text.format(path=evil.path))
    for read in (read_options, lambda path: read_yaml(path, "--config")):
        with pytest.raises(InputError, match=r"x\.yaml: not valid YAML"):
            read(path)


def bash(folder, script, *args, **env):
    (folder / "path.sh").write_text(
        f"export PATH='{Path(sys.executable).parent}':$PATH PYTHONPATH='{ROOT}'\n"
    )
    text = f"set -euo pipefail\nscripts='{SCRIPTS}'\n{script}"
    return subprocess.run(
        ["bash", "-c", text, "recipe", *map(str, args)],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, **env},
    )


OPTIONS = """
. "$scripts/options.sh"
opt nj 1 "processes" positive
opt python python3 "Python"
opt name "" "a name"
parse_options "$@"
echo "$nj|$python|$name"
"""


@pytest.mark.parametrize(
    "config, said",
    [
        ({"python": "./evil"}, "o.yaml: python: not from a file: give --python ./evil"),
        ({"name": "x\0python\0./evil"}, "o.yaml: 'name': a null character"),
        ({"PATH": "."}, "o.yaml: unknown option --PATH"),
        ({"x[$(mkdir pwned)]": 1}, "unknown option --x[$(mkdir pwned)]"),
        ({"_opt_names[$(mkdir pwned)]": 1}, "unknown option"),
        ({"nj": "x[$(mkdir pwned)]"}, "must be a whole number above 0"),
        ({"config": "other.yaml"}, "unknown option --config"),
    ],
)
def test_a_configuration_that_sets_what_it_should_not(tmp_path, evil, config, said):
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(config))
    done = bash(tmp_path, OPTIONS, "--config", "o.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert said in line


def test_a_configuration_is_text_whatever_is_in_it(tmp_path, evil):
    (tmp_path / "o.yaml").write_text(yaml.safe_dump({"name": "$(mkdir pwned) `mkdir pwned` ; *"}))
    done = bash(tmp_path, OPTIONS, "--config", "o.yaml")
    assert done.stdout == "1|python3|$(mkdir pwned) `mkdir pwned` ; *\n", done.stderr


# -------------------------------------------------------------------------------- pipes


def test_file_names_that_read_as_commands(tmp_path, evil, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mkdir pwned |").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"mkdir pwned \|: its name reads as a command"):
        plan_enhancement(["mkdir pwned |"], tmp_path / "out")
    Path("mkdir pwned |").rename("mkdir pwned | ")
    Path("|mkdir pwned").write_bytes(b"RIFF")
    for entry in ("mkdir pwned | :12", "|mkdir pwned:3", "|mkdir pwned"):
        with pytest.raises(InputError):
            read_audio(entry, 16000)


@pytest.mark.parametrize("kind", ["command", "url"])
def test_cuts_with_commands_or_addresses(tmp_path, evil, kind):
    pytest.importorskip("lhotse")
    source = f"mkdir '{evil.path}'" if kind == "command" else "https://example.org/x.wav"
    cut = {
        "id": "c", "start": 0.0, "duration": 0.5, "channel": 0, "type": "MonoCut",
        "supervisions": [{"id": "s", "recording_id": "r", "start": 0, "duration": 0.5, "text": "A"},
        ],
        "recording": {
            "id": "r", "sampling_rate": 16000, "num_samples": 8000, "duration": 0.5,
            "sources": [{"type": kind, "channels": [0], "source": source}],
        },
    }  # fmt: skip
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut) + "\n")
    said = r"cuts\.jsonl: c: a command, which would be run: 'mkdir .*--allow_pipes"
    if kind == "url":
        said = r"cut c: audio of type 'url', which is not read"
    with pytest.raises(InputError, match=said):
        import_cuts(tmp_path / "cuts.jsonl", tmp_path / "out", lexicon=Lexicon({"A": "AH0"}))


# ----------------------------------------------------------------------------- archives


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_bombs(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(downloads, "MIN_BOMB", 10**6)
    archive, content = tmp_path / f"x{suffix}", bytes(4_000_000)
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("zeros", content)
    else:
        with tarfile.open(archive, "w:gz") as file:
            member = tarfile.TarInfo("zeros")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=r"looks like a bomb: nothing was unpacked"):
        extract(archive, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.endswith(".lock")]
    monkeypatch.setattr(downloads, "MIN_BOMB", 10**7)
    assert extract(archive, tmp_path / "out")
    assert (tmp_path / "out" / "zeros").stat().st_size == len(content)


# ---------------------------------------------------------------------------- downloads


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "http://10.0.0.1/x", "http://127.0.0.1.example.org/x",
            "http://localhost.example.org/x", "http://localhost@example.org/x"]
)  # fmt: skip
def test_downloads_are_encrypted(tmp_path, url, monkeypatch):
    monkeypatch.setattr(downloads, "_open_url", lambda *_, **__: pytest.fail("asked for it"))
    with pytest.raises(InputError, match="not encrypted"):
        download(url, tmp_path / "x", "md5:" + "0" * 32)


def test_downloads_have_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_open_url", lambda *_, **__: pytest.fail("asked for it"))
    with pytest.raises(InputError, match=r"https://example\.org/x: no checksum"):
        download("https://example.org/x", tmp_path / "x")


@pytest.mark.parametrize(
    "target, said",
    [("http://example.org/x", "not encrypted"), ("file:///etc/passwd", "not allowed")],
)
def test_servers_cannot_lead_to_where_one_would_not_go(tmp_path, target, said):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.raises(InputError, match=said):
            download(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not (tmp_path / "x").exists()


# ----------------------------------------------------------------------- what is written


def test_markup_in_names_is_shown_as_it_is():
    table = markdown_table(["system", "<img src=x>"], [["<script>alert(1)</script>", "1 & 2 | 3"]])
    assert not re.search("<[a-z/]", table)
    assert "&lt;script&gt;" in table and "1 &amp; 2 \\| 3" in table


TRAINING = """
for file in options records jobs train; do . "$scripts/$file.sh"; done
. ./path.sh
cmd_backend=local num_nodes=1 python=python3 ngpu=0
echo x > input
train exp/x input -- python3 -c 'import logging; logging.warning("training")'
run_job data exp/fails.log python3 -m posinv.bin.validate_data nowhere || true
"""


def test_secrets_of_the_environment_are_written_nowhere(tmp_path, monkeypatch):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
    done = bash(tmp_path, TRAINING, **dict.fromkeys(names, SECRET))
    assert "exp/x: trained" in done.stdout, done.stderr
    assert (tmp_path / "exp/x/run.sh").exists() and "validate_data" in done.stderr
    texts = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(texts) >= 4
    for name in names:
        monkeypatch.setenv(name, SECRET)
    for text in (*texts, done.stdout, done.stderr, provenance("run.sh --stage 1")):
        assert SECRET not in text
