"""Uploads, by huggingface_hub's own client, to a small hub on this machine."""

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
import yaml

from posinv.bin import cli
from posinv.bin import export as command
from posinv.errors import InputError
from posinv.inference.hub import push_folder
from posinv.models.demucs import Demucs

TOKEN = "hf_SecretSecretSecret"
NAME = "someone/my-model"


class Hub(ThreadingHTTPServer):
    """What an upload needs of the hub: repositories, and one commit into each."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.fails = {}  # status codes, by a part of the path
        self.message = "no"

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", self.server.message)
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_POST(self):
        hub, body = self.server, self.body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for part, status in hub.fails.items():
            if part in self.path:
                return self.answer(status, {"error": hub.message})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'someone'}/{asked['name']}"
            if name in hub.repositories:
                return self.answer(409, {"error": "You already created this model repo"})
            hub.repositories[name] = {"asked": asked, "files": {}}
            return self.answer(200, {"url": f"{hub.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        _, _, _, owner, model, action, _ = self.path.split("?")[0].split("/")
        assert action == "commit"
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                hub.repositories[f"{owner}/{model}"]["files"][entry["value"]["path"]] = content
        commit = f"{hub.address}/{owner}/{model}/commit/{'0' * 40}"
        return self.answer(200, {"commitUrl": commit, "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n\n# A model\n")
    (folder / "model.th").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def exp(tmp_path):
    """A training directory of a DEMUCS, as far as the export reads it."""
    exp = tmp_path / "exp"
    exp.mkdir()
    conf = {"hidden": 2, "depth": 1, "resample": 1}
    config = {
        "separator": "demucs", "separator_conf": conf, "model_conf": {},
        "criterions": [{"name": "si_snr", "conf": {}, "wrapper_conf": {}}],
    }  # fmt: skip
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    state = {f"separator.{name}": value for name, value in Demucs(**conf).state_dict().items()}
    torch.save(state, exp / "valid.loss.best.pth")
    return exp


def export(monkeypatch, exp, *options):
    out = exp.parent / "out"
    argv = ["posinv-export", "--exp", str(exp), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", argv)
    cli.run(command.main)
    return out


@pytest.mark.parametrize("public", [False, True])
def test_command(hub, exp, monkeypatch, capfd, public):
    out = export(monkeypatch, exp, "--push", "my-model", *["--public"] * public)
    repository = hub.repositories[NAME]
    assert repository["asked"]["visibility"] == ("public" if public else "private")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert repository["files"] == files and {"README.md", "model.th", "model.yaml"} == set(files)
    said = capfd.readouterr()
    kind = "public" if public else "private"
    assert f"{hub.address}/{NAME}: {kind} repository, uploaded\n" in said.out
    assert TOKEN not in said.out + said.err
    assert TOKEN.encode() not in b"".join(files.values())


def refused(folder, match, name=NAME):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=match) as caught:
        push_folder(folder, name)
    message = str(caught.value)
    assert message.startswith(f"--push {name}: ") and "\n" not in message and TOKEN not in message
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    return message


def test_what_exists_is_not_overwritten(hub, folder):
    push_folder(folder, NAME)
    (folder / "model.th").write_bytes(b"other")
    message = refused(folder, "exists already: take another name")
    assert message.endswith(f"hf upload {NAME} '{folder}'")
    assert hub.repositories[NAME]["files"]["model.th"] != b"other"


def test_no_token(hub, folder, exp, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "none"))
    refused(folder, r"no token for the Hugging Face hub: log in \(hf auth login\)")
    with pytest.raises(SystemExit):
        export(monkeypatch, exp, "--push", NAME)
    assert not (exp.parent / "out").exists()  # known before the export
    assert capsys.readouterr().err.count("\n") == 1
    assert not hub.repositories


def test_a_token_that_is_not_accepted(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "hf_other" not in refused(folder, "the hub does not accept the token")


def test_no_right(hub, folder):
    hub.fails["/create"] = 403
    refused(folder, "the token has no right to write there")


def test_a_failure_while_uploading(hub, folder):
    hub.fails["/commit/"] = 400
    hub.message = f"the request with {TOKEN} is wrong"  # a hub that says too much
    refused(
        folder, "the hub answers 400: the request with <token> is wrong. The export is complete"
    )


def test_no_network(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    refused(folder, r"the hub cannot be reached \(ConnectError\)")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(folder, "switched off by HF_HUB_OFFLINE")


@pytest.mark.parametrize("name", ["a/b/c", "with space", "x--y", ""])
def test_names(hub, folder, name):
    refused(folder, "no name for a repository of the hub", name)
    assert not hub.repositories


def test_public_without_push(exp, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        export(monkeypatch, exp, "--public")
    assert "--public is for --push" in capsys.readouterr().err
    assert not (exp.parent / "out").exists()
