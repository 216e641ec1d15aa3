import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from posinv.bin.query_search import encoder
from posinv.data.audio import read_audio, write_audio
from posinv.ssl import SSLUpstream

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path):
    """Two queries, and documents that hold them; the folder of the search."""
    rng = np.random.default_rng(0)
    noise = {name: 0.1 * rng.standard_normal(6400) for name in "ab"}
    audio = {f"query-{name}": x for name, x in noise.items()}
    audio |= {f"doc-{n}": np.concatenate([0.1 * rng.standard_normal(3200), noise[n]]) for n in "ab"}
    for name, x in audio.items():
        write_audio(tmp_path / f"{name}.flac", x, 16000)
    for scp, kind in (("queries.scp", "query"), ("documents.scp", "doc")):
        lines = [f"{kind}-{name} {tmp_path}/{kind}-{name}.flac\n" for name in "ab"]
        (tmp_path / scp).write_text("".join(lines))
    (tmp_path / "utt2set").write_text("doc-a test\ndoc-b test\n")
    (tmp_path / "relevance").write_text("query-a doc-a\nquery-b doc-b\n")
    return tmp_path


def run(python, folder, *options):
    files = {"queries": "queries.scp", "documents": "documents.scp"}
    files |= {"utt2set": "utt2set", "relevance": "relevance", "out": "scores.json"}
    named = [part for name, file in files.items() for part in (f"--{name}", folder / file)]
    command = [*python, "-m", "posinv.bin.query_search", *named, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_command(python, folder, tiny_ssl):
    done = run(python, folder, "--ssl", tiny_ssl, "--layer", "0")
    assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["test"]["mtwv"] == pytest.approx(1)
    header, *rows = (folder / "scores.tsv").read_text().splitlines()
    assert header.split("\t") == ["query", "document", "set", "relevant", "score"]
    assert rows[0] == "query-a\tdoc-a\ttest\t1\t1.0000"
    assert len(rows) == 4

    write_audio(folder / "doc-b.flac", np.zeros(300), 16000)
    done = run(python, folder, "--ssl", tiny_ssl)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert f"{folder / 'documents.scp'}: doc-b: " in line and "300" in line
    done = run(python, folder, "--ssl", tiny_ssl, "--enh_model", "x.pth")
    assert "--enh_config and --enh_model: both are needed" in done.stderr


def test_features_are_one_layer_of_the_model(folder, tiny_ssl):
    wave = torch.from_numpy(read_audio(str(folder / "doc-a.flac"), 16000))[None]
    hidden, _ = SSLUpstream(tiny_ssl)(wave, [wave.shape[1]])
    for layer in (-1, 1):
        args = argparse.Namespace(ssl=tiny_ssl, enh_config=None, layer=layer, ngpu=0)
        got = encoder(args)(str(folder / "doc-a.flac"), "doc-a")
        assert np.array_equal(got, hidden[layer, 0].detach().numpy())


def test_features_are_the_front_ends(folder, tiny_ssl, enh_dir):
    from posinv.espnet.frontends import EnhSSLFrontend

    files = {"enh_config": enh_dir / "config.yaml", "enh_model": enh_dir / "valid.loss.best.pth"}
    frontend = EnhSSLFrontend(tiny_ssl, **{name: str(path) for name, path in files.items()})
    wave = torch.from_numpy(read_audio(str(folder / "doc-a.flac"), 16000))[None]
    with torch.no_grad():
        layers, _ = frontend.encode(wave, torch.tensor([wave.shape[1]]))
    args = argparse.Namespace(ssl=tiny_ssl, layer=-1, ngpu=0, **files)
    got = encoder(args)(str(folder / "doc-a.flac"), "doc-a")
    assert got == pytest.approx(layers[-1, 0].numpy(), abs=1e-6)
