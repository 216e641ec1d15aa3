import importlib
import json
import pickle
import re
import shutil
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from posinv.bin import cli
from posinv.bin import export as command
from posinv.errors import InputError
from posinv.espnet.tasks.enh import EnhancementTask
from posinv.espnet.tasks.pretrain import PretrainTask
from posinv.espnet.tasks.ssft import SSFTTask
from posinv.inference.export import export
from posinv.models.demucs import Demucs
from posinv.report.results import ABSENT
from posinv.ssl.exact import extract
from posinv.ssl.upstream import SSLUpstream

DEMUCS = {"hidden": 4, "depth": 2, "stride": 2, "resample": 2, "causal": False}
LENGTHS = torch.tensor([6000, 4000])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_exp(folder, task, **changes):
    """Make a training directory: the task's config.yaml, and a checkpoint of random weights."""
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(changes))
    args = task.get_parser().parse_args(
        ["--config", str(folder / "train.yaml"), "--output_dir", str(folder)]
    )
    torch.manual_seed(3)
    model = task.build_model(args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    torch.save(model.state_dict(), folder / "valid.loss.best.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    return model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    exp = tmp_path_factory.mktemp("an experiment") / "ssl"
    ssl = {**TINY_SSL, "feat_extract_norm": "layer"}
    return exp, make_exp(exp, PretrainTask, num_units=7, ssl_conf=ssl)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_ssl):
    exp = tmp_path_factory.mktemp("an experiment") / "laser"
    return exp, make_exp(exp, SSFTTask, ssl=tiny_ssl)


@pytest.fixture(scope="module")
def enhancer(tmp_path_factory):
    exp = tmp_path_factory.mktemp("an experiment") / "enh"
    conf = {"encoder": "same", "decoder": "same", "separator": "demucs", "separator_conf": DEMUCS}
    return exp, make_exp(exp, EnhancementTask, **conf)


def ssl_of(model):
    """Return the SSL model in a training's model, and whether its input is normalised."""
    upstream = getattr(model, "upstream", None)
    return (upstream.model, upstream.normalize) if upstream else (model.ssl, model.normalize)


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def run_block(code):
    names = {}
    exec(code, names)
    return names


def assert_same(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("which", ["pretrained", "tuned"])
def test_ssl_features_are_those_of_the_trained_model(which, request, tmp_path):
    exp, trained = request.getfixturevalue(which)
    out = tmp_path / "a folder"
    export(exp, out, command="x")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    ssl, normalize = ssl_of(trained)
    assert normalize == (which == "pretrained")
    waves = 0.3 + torch.randn(2, 6000)
    with torch.no_grad():
        expected, frames = extract(ssl, waves, LENGTHS, normalize)
        hidden, exported_frames = SSLUpstream(out)(waves, LENGTHS)
        assert exported_frames.tolist() == frames.tolist()
        for layer, states in enumerate(expected):
            for i, n in enumerate(frames):
                assert_same(hidden[layer, i, :n], states[i, :n])

        inputs = Wav2Vec2FeatureExtractor.from_pretrained(out)(
            waves[0].numpy(), sampling_rate=16000, return_tensors="pt"
        )
        alone = AutoModel.from_pretrained(out).eval()(**inputs, output_hidden_states=True)
        trained_alone = ssl.eval()(**inputs, output_hidden_states=True)
        for layer, states in enumerate(alone.hidden_states):
            assert_same(states, trained_alone.hidden_states[layer])
            # The feature extractor normalises with NumPy.
            assert_same(states[0], expected[layer][0], 1e-5)


def test_the_weights_are_of_training_not_of_the_base(tuned, tiny_ssl, tmp_path):
    export(tuned[0], tmp_path / "out", command="x")
    base, ours = AutoModel.from_pretrained(tiny_ssl), AutoModel.from_pretrained(tmp_path / "out")
    for name, value in ssl_of(tuned[1])[0].state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert not torch.equal(ours.masked_spec_embed, base.masked_spec_embed)


@pytest.mark.parametrize("which", ["pretrained", "tuned"])
def test_ssl_card_code_runs_as_it_is(which, request, tmp_path, monkeypatch):
    exp, trained = request.getfixturevalue(which)
    export(exp, tmp_path / "out", command="x")
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    by_transformers, by_posinv, by_s3prl = blocks(card, "python")
    ssl, normalize = ssl_of(trained)
    with torch.no_grad():
        names = run_block(by_transformers)
        expected = ssl(**names["inputs"], output_hidden_states=True).hidden_states
        assert len(names["hidden"]) == len(expected)
        assert_same(names["hidden"][-1], expected[-1])
        names = run_block(by_posinv)
        expected, _ = extract(ssl, names["speech"], names["lengths"], normalize)
        assert names["frames"].tolist() == [49, 37]
        for i, n in enumerate(names["frames"]):
            assert_same(names["hidden"][-1, i, :n], expected[-1][i, :n])
        hub, nn = ModuleType("s3prl.hub"), ModuleType("s3prl.nn")
        # How S3PRL 0.4.18 makes an upstream, by its name in s3prl.hub.
        nn.S3PRLUpstream = lambda name, path: getattr(hub, name)(refresh=False, ckpt=path)
        for module in (ModuleType("s3prl"), hub, nn):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        model = run_block(by_s3prl)["model"]
        pairs = zip(names["speech"], names["lengths"], strict=True)
        features = model([speech[:length] for speech, length in pairs])
        for i, n in enumerate(names["frames"]):
            assert_same(features["hidden_states"][-1][i, :n], expected[-1][i, :n])


def test_noise_that_is_gone_is_not_asked_for(tuned, tmp_path):
    exp = tmp_path / "exp"
    shutil.copytree(tuned[0], exp)
    config = yaml.safe_load((exp / "config.yaml").read_text())
    config["model_conf"]["views"] = {"noise_scp": "gone/noise.scp", "snrs": [5]}
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    export(exp, tmp_path / "out", command="x")
    assert "gone/noise.scp" in (tmp_path / "out/README.md").read_text()


def enhance(model, waves, lengths):
    with torch.no_grad():
        return model.separator(waves, lengths)[0][0]


def test_demucs_loads_in_denoiser(enhancer, tmp_path, monkeypatch):
    demucs = pytest.importorskip(
        "denoiser.demucs", reason="the oracle, denoiser==0.1.5, is not installed"
    ).Demucs
    exp, trained = enhancer
    export(exp, tmp_path / "out", command="x")
    assert yaml.safe_load((tmp_path / "out/model.yaml").read_text()) == DEMUCS
    get_model = importlib.import_module("denoiser.pretrained").get_model
    options = Namespace(model_path=tmp_path / "out/model.th")  # as --model_path
    with pytest.raises(pickle.UnpicklingError, match=r"denoiser\.demucs\.Demucs"):
        get_model(options)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as the card says
    oracle = get_model(options).eval()
    assert type(oracle) is demucs
    wave = torch.randn(1, 4321)
    with torch.no_grad():
        expected = oracle(wave).squeeze(1)
    assert_same(enhance(trained, wave, torch.tensor([4321])), expected, 1e-5)


def test_model_th_names_denoisers_class_and_nothing_else(enhancer, tmp_path):
    """Without denoiser: the package as its loader reads it."""
    exp, trained = enhancer
    before = {name: sys.modules.get(name) for name in ("denoiser", "denoiser.demucs")}
    export(exp, tmp_path / "out", command="x")
    assert {name: sys.modules.get(name) for name in before} == before
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "out/model.th") == [
        "denoiser.demucs.Demucs"
    ]
    stand_in = type("Demucs", (), {})
    with torch.serialization.safe_globals([(stand_in, "denoiser.demucs.Demucs")]):
        package = torch.load(tmp_path / "out/model.th", weights_only=True)
    assert package["class"] is stand_in and package["args"] == ()
    assert package["kwargs"] == {**DEMUCS, "sample_rate": 16000}
    expected = trained.separator.state_dict()
    assert package["state"].keys() == expected.keys()
    assert all(torch.equal(package["state"][name], value) for name, value in expected.items())


def test_model_yaml_has_the_options_that_the_config_left_out(tmp_path):
    conf = {"hidden": 2, "depth": 2}
    exp = tmp_path / "exp"
    make_exp(
        exp, EnhancementTask, encoder="same", decoder="same", separator="demucs",
        separator_conf=conf,
    )  # fmt: skip
    export(exp, tmp_path / "out", command="x")
    options = yaml.safe_load((tmp_path / "out/model.yaml").read_text())
    assert options == {**conf, "stride": 4, "resample": 4, "causal": True}


def test_demucs_card_code_runs_as_it_is(enhancer, tmp_path, monkeypatch):
    exp, trained = enhancer
    export(exp, tmp_path / "out", command="x")
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    by_denoiser, by_posinv = blocks(card, "python")
    names = run_block(by_posinv)
    expected = enhance(trained, names["noisy"], names["lengths"])
    assert_same(names["enhanced"], expected)
    config = tmp_path / "train.yaml"
    config.write_text(blocks(card, "yaml")[-1])
    args = EnhancementTask.get_parser().parse_args(["--config", str(config), "--output_dir", "x"])
    again = EnhancementTask.build_model(args).eval()
    assert_same(enhance(again, names["noisy"], names["lengths"]), expected)
    pytest.importorskip("denoiser", reason="the oracle, denoiser==0.1.5, is not installed")
    names = run_block(by_denoiser)
    assert_same(names["enhanced"], enhance(trained, names["noisy"], torch.tensor([16000])), 1e-5)


def test_command(pretrained, tmp_path, monkeypatch, capsys):
    for task, rates in (
        ("pr", {"test_clean": 9.69, "test_seen": 54.65}),
        ("asr", {"test_clean": 3}),
    ):
        scores = {name: {"rate": rate, "errors": 3} for name, rate in rates.items()}
        (tmp_path / f"superb/{task}/best/decode").mkdir(parents=True)
        (tmp_path / f"superb/{task}/best/decode/scores.json").write_text(json.dumps(scores))
    argv = ["export", "--exp", pretrained[0], "--out", tmp_path / "my out", "--name", "My model"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--superb", str(tmp_path / "superb")])
    command.main()
    card = (tmp_path / "my out/README.md").read_text()
    assert "\n# My model\n" in card
    rows = [re.split(r" *\| *", line)[1:-1] for line in card.splitlines() if "| test_" in line]
    assert rows == [["test_clean", "9.7", "3.0"], ["test_seen", "54.6", ABSENT]]
    assert "`valid.loss.best.pth`" in card
    assert f"python -m posinv.bin.export --exp '{pretrained[0]}'" in card
    with pytest.raises(SystemExit, match="1"):
        cli.run(command.main)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "exists already" in error


class TestRefusals:
    def refuse(self, exp, tmp_path, match, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=match) as caught:
            export(exp, tmp_path / "out", command="x", **options)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    def test_other_experiments(self, tmp_path):
        exp = tmp_path / "exp"
        exp.mkdir()
        self.refuse(exp, tmp_path, r"config\.yaml")
        for text in (
            "token_list: [a]\nfrontend: ssl\n",
            "[1]\n",
            "",
            "separator: tcn\n",
            "num_units: 3\n",
            "ssl: null\n",
        ):
            (exp / "config.yaml").write_text(text)
            self.refuse(exp, tmp_path, r"config\.yaml: not what pretrain_train, ssft_train or")
        (exp / "config.yaml").write_text("separator: tcn\nseparator_conf: {}\nssl: null\n")
        self.refuse(exp, tmp_path, r"config\.yaml: the separator is tcn, but only demucs")

    def test_output_that_exists(self, pretrained, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").touch()
        self.refuse(pretrained[0], tmp_path, "out: exists already")

    @pytest.mark.parametrize("which", ["pretrained", "tuned", "enhancer"])
    def test_checkpoints(self, which, request, tmp_path):
        exp, trained = request.getfixturevalue(which)
        self.refuse(exp, tmp_path, "9epoch.pth: No such file", checkpoint="9epoch.pth")
        other = tmp_path / "other.pth"
        other.write_text("text")
        self.refuse(
            exp, tmp_path, "other.pth: not (a checkpoint|tensors|weights)", checkpoint=other
        )
        state = trained.state_dict()
        state.popitem()
        torch.save(state, other)
        self.refuse(exp, tmp_path, r"other.pth: not weights of .* Missing key", checkpoint=other)
        torch.save({**trained.state_dict(), "more": torch.ones(1)}, other)
        self.refuse(exp, tmp_path, "other.pth: not weights of .* Unexp", checkpoint=other)
        torch.save([1], other)
        self.refuse(
            exp, tmp_path, "other.pth: not (a checkpoint|tensors|weights)", checkpoint=other
        )

    def test_scores_that_are_not_there(self, pretrained, tmp_path):
        superb = tmp_path / "superb"
        self.refuse(pretrained[0], tmp_path, "scores.json: cannot read", superb=superb)
        (superb / "pr/best/decode").mkdir(parents=True)
        (superb / "pr/best/decode/scores.json").write_text('{"test": {"rate": 1.0}}')
        self.refuse(pretrained[0], tmp_path, "asr/best/decode/scores.json: cannot", superb=superb)

    def test_licence_of_no_base(self, pretrained, tmp_path):
        self.refuse(pretrained[0], tmp_path, "no base model", base_license="mit")


@pytest.mark.parametrize("which", ["pretrained", "tuned", "enhancer"])
def test_a_failure_half_way_leaves_nothing(which, request, tmp_path):
    """The title isn't valid UTF-8, so the card, the last file, cannot be written."""
    with pytest.raises(UnicodeEncodeError):
        export(request.getfixturevalue(which)[0], tmp_path / "out", command="x", name="\ud800")
    assert not list(tmp_path.iterdir())


def test_posinv_does_not_import_the_oracle(enhancer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "denoiser", None)
    export(enhancer[0], tmp_path / "out", command="x")
    assert Demucs(**DEMUCS, checkpoint=tmp_path / "out/model.th")
