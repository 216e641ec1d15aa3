"""Other people's models in posinv's tasks: ESPnet's for enhancement, transformers' SSL models."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.bin import enh_inference
from tiny_ssl import TINY_SSL
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    SEWConfig,
    UniSpeechSatConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    WavLMConfig,
)

from posinv.bin import enh_import
from posinv.errors import InputError
from posinv.espnet.frontends import EnhSSLFrontend, SSLFrontend
from posinv.espnet.load import load_enhancement_model
from posinv.espnet.tasks.enh import EnhancementTask
from posinv.espnet.tasks.ssft import SSFTTask
from posinv.inference.enhancer import Enhancer

SMALL = Path(__file__).resolve().parents[3] / "conf" / "small"
SSL = {
    "hubert": HubertConfig(**TINY_SSL),
    "wavlm": WavLMConfig(**TINY_SSL),
    "wav2vec2": Wav2Vec2Config(**TINY_SSL),
    "data2vec-audio": Data2VecAudioConfig(
        **{**TINY_SSL, "num_conv_pos_embeddings": 2}, conv_pos_kernel_size=7
    ),
    "unispeech-sat": UniSpeechSatConfig(**TINY_SSL),
    "sew": SEWConfig(
        **TINY_SSL, conv_kernel=[10, 3, 3, 3, 3, 2, 2], conv_stride=[5, 2, 2, 2, 2, 2, 2]
    ),
    "wav2vec2-conformer": Wav2Vec2ConformerConfig(**TINY_SSL),
    "wav2vec2-bert": Wav2Vec2BertConfig(
        **{key: value for key, value in TINY_SSL.items() if "conv" not in key}
    ),
}
MODELS = {
    "demucs": {
        "encoder": "same",
        "separator": "demucs",
        "separator_conf": {"hidden": 4, "depth": 2, "resample": 1},
        "decoder": "same",
    },
    "masking": {
        "encoder": "stft",
        "encoder_conf": {"n_fft": 128, "hop_length": 64},
        "separator": "rnn",
        "separator_conf": {"num_spk": 1, "rnn_type": "lstm", "layer": 1, "unit": 8},
        "decoder": "stft",
        "decoder_conf": {"n_fft": 128, "hop_length": 64},
    },
    "conv_tasnet": "conv_tasnet.yaml",
    "tfgridnet": "tfgridnet.yaml",
}
TRAINING = {
    "optim": "adam",
    "optim_conf": {"lr": 0.001},
    "max_epoch": 1,
    "batch_type": "sorted",
    "batch_size": 2,
    "num_workers": 0,
    "best_model_criterion": [["valid", "loss", "min"]],
    "use_matplotlib": False,
    "use_tensorboard": False,
}
SI_SNR = [{"name": "si_snr", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {}}]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_utterances):
    """A folder with the lists of four short noisy and clean utterances of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    write_utterances(folder, 4)
    return folder


@pytest.fixture(scope="module")
def ssl_models(tmp_path_factory):
    """A folder with a model of each family, with random weights."""
    top = tmp_path_factory.mktemp("ssl")
    torch.manual_seed(0)
    for name, config in SSL.items():
        AutoModel.from_config(config).save_pretrained(top / name)
    return top


def train(task, data, folder, config, *options, names=("speech_mix", "speech_ref1")):
    """Train in this process; return the best checkpoint."""
    folder.mkdir()
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAINING | config))
    command = ["--config", str(folder / "train.yaml"), "--output_dir", str(folder)]
    for part in ("train", "valid"):
        for name, scp in zip(names, ("wav.scp", "spk1.scp"), strict=False):
            command += [f"--{part}_data_path_and_name_and_type", f"{data / scp},{name},sound"]
        command += [f"--{part}_shape_file", str(data / "shape")]
    task.main(cmd=[*command, *map(str, options)])
    return folder / "valid.loss.best.pth"


def waves_of(data):
    return [soundfile.read(data / f"wav{i}.wav", dtype="float32")[0] for i in range(4)]


@pytest.mark.parametrize("name", MODELS)
def test_enhancement_model(name, data, ssl_models, tmp_path):
    """Train the model, fine-tune it through an SSL model, enhance with it, put it into enh_ssl."""
    model = tmp_path / "model.yaml"
    if isinstance(MODELS[name], str):
        model = SMALL / "enh" / MODELS[name]
    else:
        model.write_text(yaml.safe_dump(MODELS[name]))
    ssl_folder = ssl_models / "hubert"
    enh = tmp_path / "enh"
    before = train(EnhancementTask, data, enh, {"criterions": SI_SNR}, "--model_config", model)
    tuned = tmp_path / "tuned"
    after = train(
        *(EnhancementTask, data, tuned, {}),
        *("--criterion_file", SMALL / "criteria" / "ssl_softdtw.yaml", "--ssl", ssl_folder),
        *("--model_config", enh / "config.yaml", "--init_param", before),
    )
    states = [torch.load(path, weights_only=True) for path in (before, after)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.isfinite(value).all() for value in states[1].values())
    assert not all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # Fine-tuning starts from --init_param: two updates change a weight by at most 2 x 0.001.
    assert max((states[0][key] - states[1][key]).abs().max() for key in states[0]) < 2.1e-3
    saved = yaml.safe_load((tuned / "config.yaml").read_text())
    assert saved["separator"] == yaml.safe_load(model.read_text())["separator"]
    assert saved["model_config"] is None

    enh_inference.main(
        [
            *("--output_dir", str(tmp_path / "out"), "--fs", "16000"),
            *("--data_path_and_name_and_type", f"{data / 'wav.scp'},speech_mix,sound"),
            *("--train_config", str(tuned / "config.yaml"), "--model_file", str(after)),
        ]
    )
    separate = load_enhancement_model(tuned / "config.yaml", after)
    frontend = EnhSSLFrontend(str(ssl_folder), str(tuned / "config.yaml"), str(after))
    clean_frontend = SSLFrontend(str(ssl_folder))
    waves = waves_of(data)
    lengths = torch.tensor([len(wave) for wave in waves])
    padded = torch.zeros(4, int(lengths.max()))
    for b, wave in enumerate(waves):
        padded[b, : len(wave)] = torch.from_numpy(wave)
    features, frames = frontend(padded, lengths)
    for b, wave in enumerate(waves):
        [[enhanced]] = separate(wave[None], fs=16000)
        assert enhanced.shape == wave.shape
        written = soundfile.read(tmp_path / "out" / "wavs" / "1" / f"utt{b}.wav")[0]
        assert np.abs(written - enhanced.clip(-1, 1)).max() < 1e-4  # 16 bits
        expected, _ = clean_frontend(torch.from_numpy(enhanced)[None], lengths[b : b + 1])
        torch.testing.assert_close(features[b, : frames[b]], expected[0], rtol=1e-4, atol=1e-5)
    assert Enhancer(tuned)(waves[0], 16000).shape == waves[0].shape


@pytest.mark.parametrize("name", SSL)
def test_ssl_model(name, data, ssl_models, tmp_path):
    """Fine-tune the SSL model by LASER; fine-tune an enhancement model through it."""
    ssl_folder = ssl_models / name
    checkpoint = train(
        *(SSFTTask, data, tmp_path / "laser", {"model_conf": {"trainable_layers": 1}}),
        *("--ssl", ssl_folder, "--method_file", SMALL / "methods" / "laser.yaml"),
        names=("speech",),
    )
    state = torch.load(checkpoint, weights_only=True)
    original = AutoModel.from_pretrained(ssl_folder).state_dict()
    tuned = {k.split(".model.", 1)[1]: v for k, v in state.items() if ".model." in k}
    changed = {key for key in tuned if not torch.equal(tuned[key], original[key])}
    assert changed
    assert all(key.startswith("encoder.layers.1.") for key in changed)

    checkpoint = train(
        *(EnhancementTask, data, tmp_path / "enh", MODELS["demucs"]),
        *("--criterion_file", SMALL / "criteria" / "ssl_mse_pad.yaml", "--ssl", ssl_folder),
    )
    log_of_loss = yaml.safe_load((tmp_path / "enh" / "config.yaml").read_text())["criterions"]
    assert log_of_loss[0]["conf"]["ssl"] == str(ssl_folder)
    assert all(torch.isfinite(v).all() for v in torch.load(checkpoint, weights_only=True).values())


@pytest.mark.parametrize("task", [EnhancementTask, SSFTTask])
def test_chunks(task, data, ssl_models, tmp_path):
    """ESPnet's chunk iterator, which gives no lengths."""
    chunks = {"iterator_type": "chunk", "chunk_length": "1600,2000", "num_cache_chunks": 4}
    ssl = ("--ssl", ssl_models / "hubert")
    if task is EnhancementTask:
        names, config = ("speech_mix", "speech_ref1"), MODELS["demucs"] | chunks
        ssl += ("--criterion_file", SMALL / "criteria" / "ssl_softdtw.yaml")
    else:
        names, config = ("speech",), chunks
    folder = tmp_path / "exp"
    checkpoint = train(task, data, folder, config, *ssl, names=names)
    state = torch.load(checkpoint, weights_only=True)
    assert all(torch.isfinite(value).all() for value in state.values())
    epoch = torch.load(folder / "checkpoint.pth", weights_only=False)["reporter"]["stats"][1]
    assert math.isfinite(epoch["valid"]["loss"])


def test_weights_of_an_espnet_training_are_imported(data, tmp_path, monkeypatch):
    config = {"criterions": SI_SNR}
    model = SMALL / "enh" / "conv_tasnet.yaml"
    checkpoint = train(EnhancementTask, data, tmp_path / "enh", config, "--model_config", model)
    for number, source in enumerate((model, tmp_path / "enh" / "config.yaml")):
        out = tmp_path / f"imported{number}"
        command = ["--config", source, "--checkpoint", checkpoint, "--output_dir", out]
        monkeypatch.setattr(sys, "argv", ["enh_import", *map(str, command)])
        enh_import.main()
        states = [
            torch.load(path, weights_only=True)
            for path in (checkpoint, out / "valid.loss.best.pth")
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        load_enhancement_model(out / "config.yaml", out / "valid.loss.best.pth")
    with pytest.raises(InputError, match=r"not weights of the model in .*tfgridnet.yaml"):
        enh_import.build(SMALL / "enh" / "tfgridnet.yaml", checkpoint, tmp_path / "other")
    with pytest.raises(InputError, match="No such file"):
        enh_import.build(model, tmp_path / "none.pth", tmp_path / "other")


def test_released_weights_are_imported(tmp_path):
    config = tmp_path / "enh.yaml"
    config.write_text(yaml.safe_dump(MODELS["demucs"]))
    arguments = EnhancementTask.get_parser().parse_args(["--output_dir", str(tmp_path / "enh")])
    vars(arguments).update(MODELS["demucs"])
    state = EnhancementTask.build_model(arguments).state_dict()
    bare = {key.removeprefix("separator."): value for key, value in state.items()}
    torch.save(bare, tmp_path / "released.th")
    made, imported = enh_import.build(config, tmp_path / "released.th", tmp_path / "enh")
    assert all(torch.equal(imported[key], state[key]) for key in state)
    assert made.separator_conf.get("checkpoint") is None
    (tmp_path / "text.th").write_text("hello")
    with pytest.raises(InputError, match=r"not (a checkpoint that|tensors alone)"):
        enh_import.build(config, tmp_path / "text.th", tmp_path / "enh")


BAD = {
    "no file": (None, "No such file"),
    "no model": ("optim: adam", "must have encoder, separator and decoder"),
    "list": ("[1]", "must have encoder, separator and decoder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_model_config(case, data, tmp_path):
    text, message = BAD[case]
    path = tmp_path / "model.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=f"--model_config {re.escape(str(path))}: {message}"):
        train(EnhancementTask, data, tmp_path / "enh", {}, "--model_config", path)
