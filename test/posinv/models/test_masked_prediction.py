import argparse
import json
import sys

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HubertConfig, HubertModel

from posinv.bin import cli, export, pretrain_train, pretrain_units
from posinv.data.units import assign_units, learn_units, load_units_model, mfcc_features
from posinv.errors import InputError
from posinv.espnet.tasks.pretrain import PretrainTask
from posinv.models.masked_prediction import MaskedPredictionModel, draw_time_mask
from posinv.ssl.load import frame_lengths
from posinv.ssl.upstream import SSLUpstream

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
NO_DROPOUT = dict.fromkeys(
    ["hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"], 0.0
)
UNITS = 7

pytestmark = pytest.mark.usefixtures("seeded")


def make_batch(lengths):
    frames = frame_lengths(HubertConfig(), torch.tensor(lengths))
    units = torch.full((len(lengths), frames.max()), -1)
    for row, n in zip(units, frames.tolist(), strict=True):
        row[:n] = torch.randint(UNITS, (n,))
    return {
        "speech": torch.randn(len(lengths), max(lengths)),
        "speech_lengths": torch.tensor(lengths),
        "units": units,
        "units_lengths": frames,
        "utt_id": [f"utt{i}" for i in range(len(lengths))],
    }


@given(st.integers(400, 60000))
@settings(max_examples=20, deadline=None)
def test_mfcc_has_a_row_for_each_ssl_frame(samples):
    wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    features = mfcc_features(wave)
    assert features.shape == (frame_lengths(HubertConfig(), torch.tensor(samples)), 39)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-3 * np.abs(features).max())


def test_mfcc_frame_sees_what_the_ssl_frame_sees():
    """Frame i's MFCCs depend on samples 320 i to 320 i + 400 alone.

    The difference to frame 0 cancels the utterance's mean. Preemphasis reaches one sample further.
    """
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(16000).astype(np.float32)
    changed = wave.copy()
    changed[320 * 20 + 100 : 320 * 20 + 110] += 3.0  # in frame 20, past the end of frame 19
    difference = (mfcc_features(changed) - mfcc_features(wave))[:, :13]
    difference -= difference[0]
    affected = np.flatnonzero(np.abs(difference).max(1) > 1e-3)
    assert affected.tolist() == [20]


def test_mfcc_equals_librosa_on_one_window():
    """The oracle: MFCCs of the window cut out by hand, mean not subtracted."""
    wave = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    emphasised = librosa.effects.preemphasis(wave)
    expected = []
    for i in range(12):
        window = emphasised[320 * i : 320 * i + 400] * np.hanning(401)[:400]
        mel = librosa.filters.mel(sr=16000, n_fft=400, n_mels=23, fmin=20)
        decibel = librosa.power_to_db(mel @ np.abs(np.fft.rfft(window)) ** 2)
        cepstrum = librosa.feature.mfcc(S=decibel[:, None], n_mfcc=13, lifter=22)
        expected.append(cepstrum[:, 0])
    expected = np.stack(expected)
    np.testing.assert_allclose(
        mfcc_features(wave)[:, :13], expected - expected.mean(0), rtol=0, atol=1e-2
    )


def test_silence_has_finite_features():
    assert np.isfinite(mfcc_features(np.zeros(5000, np.float32))).all()


def test_units_are_the_nearest_centres():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 5)).astype(np.float32)
    centres = learn_units([features[:100], features[100:]], 6, seed=3)
    assert centres.shape == (6, 5)
    distances = ((features[:, None] - centres) ** 2).sum(-1)
    np.testing.assert_array_equal(assign_units(features, centres), distances.argmin(1))
    np.testing.assert_array_equal(learn_units([features], 6, seed=3), centres)
    assert not np.array_equal(learn_units([features], 6, seed=4), centres)
    with pytest.raises(InputError, match="num_units 301: more than the 300 frames"):
        learn_units([features], 301, seed=0)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None)
def test_time_mask_stays_in_the_utterance_and_leaves_context(lengths, seed):
    torch.manual_seed(seed)
    mask = draw_time_mask(torch.tensor(lengths), [str(i) for i in range(len(lengths))], 0.8, 10)
    assert mask.shape == (len(lengths), max(lengths))
    for row, n in zip(mask, lengths, strict=True):
        assert row[:n].any() and not row[n:].any()
        # Runs of masked frames are whole spans.
        edges = torch.diff(row.int(), prepend=torch.tensor([0]), append=torch.tensor([0]))
        runs = (edges == -1).nonzero() - (edges == 1).nonzero()
        assert runs.min() >= min(10, max(1, n // 2))


def test_time_mask_covers_what_hubert_covers():
    n = 2000
    mask = draw_time_mask(torch.tensor([n] * 50), [str(i) for i in range(50)], 0.8, 10)
    # A frame is not masked if none of ten frames is a start, each with a probability of 0.08.
    assert mask.float().mean() == pytest.approx(1 - (1 - 0.08) ** 10, abs=0.01)


def test_time_mask_depends_on_torchs_seed_and_the_utterance_alone():
    def draw(seed, lengths, keys):
        torch.manual_seed(seed)
        torch.rand(seed)
        return draw_time_mask(torch.tensor(lengths), keys, 0.8, 10)

    mask = draw(1, [100, 50], ["a", "b"])
    assert torch.equal(draw(1, [50, 100], ["b", "a"]), mask.flip(0))
    assert torch.equal(draw(1, [50], ["b"])[0], mask[1, :50])
    assert not torch.equal(draw(2, [100, 50], ["a", "b"]), mask)
    assert not torch.equal(draw(1, [100, 50], ["a", "c"])[1], mask[1])


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_loss_is_that_of_each_utterance_alone_in_transformers(weight):
    """The oracle: HubertModel on one utterance with the same mask, cosine by torch."""
    model = MaskedPredictionModel(TINY, UNITS, unmasked_weight=weight).eval()
    batch = make_batch([16000, 5000, 400])
    torch.manual_seed(5)
    loss, stats, count = model(**batch)
    torch.manual_seed(5)
    mask = draw_time_mask(batch["units_lengths"], batch["utt_id"], 0.8, 10)
    total, hits, unmasked = [], [], []
    for i, (n, m) in enumerate(zip(batch["speech_lengths"], batch["units_lengths"], strict=True)):
        wave = batch["speech"][i : i + 1, :n]
        wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        hidden = model.ssl(wave, mask_time_indices=mask[i : i + 1, :m]).last_hidden_state[0]
        projected = model.projection(hidden)
        logits = F.cosine_similarity(projected[:, None], model.unit_embeddings, dim=-1) / 0.1
        each = F.cross_entropy(logits, batch["units"][i, :m], reduction="none")
        total.append(each[mask[i, :m]])
        unmasked.append(each[~mask[i, :m]])
        hits.append((logits.argmax(1) == batch["units"][i, :m])[mask[i, :m]])
    expected = torch.cat(total).mean() + weight * torch.cat(unmasked).sum() / mask.sum()
    torch.testing.assert_close(loss.squeeze(), expected)
    assert stats["acc"].item() == pytest.approx(torch.cat(hits).float().mean().item())
    assert count == mask.sum()


def test_every_parameter_gets_a_gradient():
    model = MaskedPredictionModel({**TINY, **NO_DROPOUT}, UNITS).train()
    model(**make_batch([8000, 6000]))[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_one_frame_utterance_trains():
    model = MaskedPredictionModel(TINY, UNITS, unmasked_weight=1.0)
    loss, _, count = model(**make_batch([400]))
    assert loss.isfinite() and count == 1


def test_it_learns_units_that_the_audio_tells():
    """Each utterance is a tone and has its unit: frames around a mask tell the masked units."""
    torch.manual_seed(0)
    model = MaskedPredictionModel({**TINY, **NO_DROPOUT}, 2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    time = torch.arange(12000) / 16000
    tones = torch.stack([torch.sin(2 * torch.pi * f * time) for f in (300, 2500)])
    batch = make_batch([12000] * 4)
    batch["speech"] = tones[[0, 1, 0, 1]]
    batch["units"] = torch.tensor([0, 1, 0, 1])[:, None].expand(4, batch["units"].size(1))
    for _ in range(40):
        optimizer.zero_grad()
        loss, stats, _ = model(**batch)
        loss.backward()
        optimizer.step()
    assert stats["acc"] == 1.0 and loss < 0.1


def test_units_that_do_not_belong_to_the_audio():
    model = MaskedPredictionModel(TINY, UNITS)
    batch = make_batch([8000, 5000])
    with pytest.raises(InputError, match="utterance utt1: 13 units for 15 frames"):
        model(**{**batch, "units_lengths": batch["units_lengths"] - torch.tensor([0, 2])})
    with pytest.raises(InputError, match=r"utterance utt0: units 7 to 7 .* 0 to 6"):
        model(**{**batch, "units": torch.full_like(batch["units"], UNITS)})


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"hidden_sise": 8}, "no 'hidden_sise'; did you mean hidden_size"),
        ({"mask_time_prob": 0.0}, "mask_time_prob must be positive"),
        ({"conv_dim": [8]}, "not a HuBERT configuration"),
    ],
)
def test_bad_ssl_conf(conf, message):
    with pytest.raises(InputError, match=message):
        MaskedPredictionModel({**TINY, **conf}, UNITS)


def test_save_pretrained_is_read_by_transformers_and_upstream(tmp_path):
    model = MaskedPredictionModel(TINY, UNITS).eval()
    model.save_pretrained(tmp_path / "ssl model")
    wave = torch.randn(1, 5000)
    again = HubertModel.from_pretrained(tmp_path / "ssl model").eval()
    torch.testing.assert_close(again(wave)[0], model.ssl(wave)[0], rtol=0, atol=0)
    ssl = SSLUpstream(tmp_path / "ssl model")
    assert ssl.normalize
    normalized = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
    expected = again(normalized, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ssl(wave, torch.tensor([5000]))[0][-1], expected)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Tones and noise in a folder with a space in its name."""
    root = tmp_path_factory.mktemp("a corpus")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        samples = 6000 + 700 * i
        tone = np.sin(2 * np.pi * 200 * (i % 3 + 1) * np.arange(samples) / 16000)
        path = root / f"utt{i}.wav"
        soundfile.write(path, 0.3 * tone + 0.05 * rng.standard_normal(samples), 16000)
        lines.append(f"utt{i} {path}\n")
    (root / "wav.scp").write_text("".join(lines))
    return root


def call(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


def test_pretrain_units_command(corpus, tmp_path, monkeypatch):
    options = ("--wav_scp", corpus / "wav.scp", "--num_units", 5)
    call(monkeypatch, pretrain_units, *options, "--out", tmp_path / "a", "--nj", 1)
    call(monkeypatch, pretrain_units, *options, "--out", tmp_path / "b", "--nj", 2)
    lines = (tmp_path / "a/units").read_text().splitlines()
    assert lines == (tmp_path / "b/units").read_text().splitlines()
    centres = load_units_model(tmp_path / "a/kmeans.npz")
    assert len(lines) == 6 and centres.shape == (5, 39)
    for i, line in enumerate(lines):
        wave, _ = soundfile.read(corpus / f"utt{i}.wav", dtype="float32")
        utt, *units = line.split(" ")
        assert utt == f"utt{i}"
        assert [int(u) for u in units] == assign_units(mfcc_features(wave), centres).tolist()
    applied = ("--kmeans", tmp_path / "a/kmeans.npz", "--out", tmp_path / "c")
    call(monkeypatch, pretrain_units, "--wav_scp", corpus / "wav.scp", *applied)
    assert (tmp_path / "c/units").read_text().splitlines() == lines
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["units"]


def test_pretrain_units_learns_from_learn_hours_alone(corpus, tmp_path, monkeypatch):
    options = ("--wav_scp", corpus / "wav.scp", "--num_units", 5, "--nj", 1)
    learnt = []
    monkeypatch.setattr(
        pretrain_units, "learn_units", lambda f, k, s: learnt.append(len(f)) or learn_units(f, k, s)
    )
    call(monkeypatch, pretrain_units, *options, "--out", tmp_path, "--learn_hours", 0.65 / 3600)
    assert learnt == [2]  # from 0.36 to 0.58 s each


def test_pretrain_units_refuses(corpus, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "short.wav", np.full(399, 0.1), 16000)
    (tmp_path / "wav.scp").write_text(f"short {tmp_path}/short.wav\n")
    with pytest.raises(InputError, match="utterance short has 399 samples"):
        call(monkeypatch, pretrain_units, "--wav_scp", tmp_path / "wav.scp", "--out", tmp_path)
    bad = ("--wav_scp", corpus / "wav.scp", "--out", tmp_path, "--kmeans")
    with pytest.raises(InputError, match="no such k-means file"):
        call(monkeypatch, pretrain_units, *bad, tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(InputError, match="not a k-means file"):
        call(monkeypatch, pretrain_units, *bad, tmp_path / "text.npz")
    assert not (tmp_path / "units").exists()
    monkeypatch.setattr(sys, "argv", ["pretrain_units", *map(str, bad), "none.npz"])
    with pytest.raises(SystemExit, match="1"):
        cli.run(pretrain_units.main)
    assert capsys.readouterr().err.count("\n") == 1


def train(corpus, out, epochs):
    """ESPnet's own stages: collect statistics, then train."""
    data = [f"{corpus / 'wav.scp'},speech,sound", f"{corpus / 'units'},units,text_int"]
    options = ["--ngpu", "0", "--num_workers", "0", "--num_units", "5", "--seed", "3"]
    for name in data:
        options += ["--train_data_path_and_name_and_type", name]
        options += ["--valid_data_path_and_name_and_type", name]
    options += ["--config", str(corpus / "train.yaml"), "--use_matplotlib", "false"]
    options += ["--use_tensorboard", "false"]
    stats = corpus / "stats"
    if not stats.exists():
        shape = ["--train_shape_file", str(corpus / "wav.scp")]
        shape += ["--valid_shape_file", str(corpus / "wav.scp"), "--batch_type", "unsorted"]
        collect = ["--collect_stats", "true", "--output_dir", str(stats), "--batch_size", "1"]
        PretrainTask.main(cmd=[*options, *shape, *collect])
    for part in ("train", "valid"):
        options += [f"--{part}_shape_file", str(stats / part / "speech_shape")]
    run = ["--output_dir", str(out), "--max_epoch", str(epochs), "--resume", "true"]
    PretrainTask.main(cmd=[*options, *run])


def test_task_trains_resumes_and_exports(corpus, tmp_path, monkeypatch):
    call(
        monkeypatch, pretrain_units, "--wav_scp", corpus / "wav.scp", "--num_units", 5,
        "--out", corpus, "--nj", 1,
    )  # fmt: skip
    conf = {
        "ssl_conf": TINY,
        "optim": "adamw",
        "optim_conf": {"lr": 1e-3},
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": 4},
        "batch_type": "numel",
        "batch_bins": 20000,
        "keep_nbest_models": 1,
        "best_model_criterion": [["valid", "loss", "min"]],
    }
    (corpus / "train.yaml").write_text(yaml.safe_dump(conf))
    train(corpus, tmp_path / "whole", 3)
    train(corpus, tmp_path / "resumed", 1)
    first = torch.load(tmp_path / "resumed/1epoch.pth", weights_only=True)
    train(corpus, tmp_path / "resumed", 3)
    whole, resumed = (
        torch.load(tmp_path / run / "3epoch.pth", weights_only=True) for run in ("whole", "resumed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(resumed["unit_embeddings"], first["unit_embeddings"])

    exp, out = tmp_path / "whole", tmp_path / "ssl"
    call(monkeypatch, export, "--exp", exp, "--out", out, "--checkpoint", "3epoch.pth")
    ssl = SSLUpstream(out)
    for name, value in ssl.model.state_dict().items():
        assert torch.equal(value, whole[f"ssl.{name}"])
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 16
    with pytest.raises(InputError, match=r"9epoch\.pth: No such file"):
        call(monkeypatch, export, "--exp", exp, "--out", f"{out}2", "--checkpoint", "9epoch.pth")


def test_train_command_has_the_tasks_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_train", "--help"])
    with pytest.raises(SystemExit):
        pretrain_train.main()
    assert "--ssl_conf" in capsys.readouterr().out


def test_the_recipes_config_builds():
    path = cli.__file__.replace("posinv/bin/cli.py", "conf/small/ssl.yaml")
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        conf = yaml.safe_load(file)
    args = PretrainTask.get_parser().parse_args(
        ["--config", path, "--output_dir", "x", "--num_units", "50"]
    )
    assert isinstance(args, argparse.Namespace) and set(conf) <= set(vars(args))
    assert PretrainTask.build_model(args).ssl.config.hidden_size == 128
