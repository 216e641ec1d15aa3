import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from espnet2.tasks.abs_task import scheduler_classes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_ssl import TINY_SSL
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, HubertConfig, WavLMConfig

from posinv.data.tables import write_table
from posinv.errors import InputError
from posinv.espnet.tasks.ssft import SSFTTask
from posinv.losses.functional import contrastive_idm, ssl_mse
from posinv.models.ssft import SSFTModel
from posinv.report.curves import read_epochs
from posinv.softdtw import SoftDTWLoss

VIEWS = {"speed": [0.9, 1.0, 1.1], "semitones": [-2, 2]}
LASER = {"alpha": 0.4, "margin": 1.1, "window": 0, "projection_size": 24, "views": VIEWS}


@pytest.fixture
def laser(tiny_ssl):
    torch.manual_seed(1)
    return SSFTModel(tiny_ssl, **LASER)


def speech(*lengths):
    rng = torch.Generator().manual_seed(3)
    waves = torch.zeros(len(lengths), max(lengths))
    for row, length in zip(waves, lengths, strict=True):
        row[:length] = 0.1 * torch.randn(length, generator=rng)
    return waves, torch.tensor(lengths), [f"utt{b}" for b in range(len(lengths))]


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


# ------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("loss", ["soft_dtw", "mse"])
def test_pair_losses_are_those_of_posinv_losses(tiny_ssl, loss):
    conf = {**LASER, "views": {"semitones": [2]}, "gamma": 0.3, "window": 2, "loss": loss}
    model = SSFTModel(tiny_ssl, **conf)
    x, y = torch.randn(2, 2, 6, 5)
    frames = torch.tensor([6, 3])
    alignment, regulariser = model.pair_losses(x, y, frames, frames)
    expected = {
        "soft_dtw": SoftDTWLoss(0.3)(x, y, frames, frames),
        "mse": ssl_mse(x, y, frames, "sum"),
    }
    assert torch.equal(alignment, expected[loss])
    idm = contrastive_idm(x, frames, 1.1, 2) + contrastive_idm(y, frames, 1.1, 2)
    assert torch.equal(regulariser, idm)


def test_batch_loss_is_the_mean_of_its_pairs_losses(laser):
    laser.eval()
    batch = speech(5000, 3000, 2500)
    with torch.no_grad():
        loss = laser(*batch)[0]
        alone = [
            laser(batch[0][b : b + 1, :n], batch[1][b : b + 1], batch[2][b : b + 1])[0]
            for b, n in enumerate(batch[1].tolist())
        ]
    torch.testing.assert_close(loss, torch.stack(alone).mean(dim=0), rtol=1e-5, atol=0)


def test_eight_pairs_give_the_gradient_of_eight_accumulated(laser):
    laser.eval()  # without dropout, which draws for the batch
    batch = speech(6400, 6000, 5200, 5000, 4100, 3000, 2000, 1600)
    laser(*batch)[0].backward()
    together = gradients(laser)
    laser.zero_grad()
    for b, n in enumerate(batch[1].tolist()):
        (laser(batch[0][b : b + 1, :n], batch[1][b : b + 1], batch[2][b : b + 1])[0] / 8).backward()
    accumulated = gradients(laser)
    assert together.keys() == accumulated.keys()
    for name, grad in together.items():
        assert (grad - accumulated[name]).norm() <= 1e-4 * grad.norm().clamp(min=1e-6), name


def test_equal_views_leave_nothing_to_align(tiny_ssl):
    model = SSFTModel(tiny_ssl).eval()
    _, stats, weight = model(*speech(4000, 2000))
    assert stats["alignment"].item() == pytest.approx(0, abs=1e-4)
    assert weight.item() == 2


# ------------------------------------------------------------------------------------ the device
class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU. The device "meta" takes the GPU's place.

    Values on "meta" cannot be read. What else would wait are copies to the device that are not
    asynchronous, and indices that are not on it.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.is_meta:
            if name == "_to_copy" and not args[0].is_meta:
                assert kwargs.get("non_blocking"), func
            if name == "copy_" and not args[1].is_meta:
                assert args[2:] == (True,) or kwargs.get("non_blocking"), func
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                assert all(index is None or index.is_meta for index in args[1]), func
        return out


@pytest.mark.parametrize("config_class", [HubertConfig, WavLMConfig])
def test_update_waits_for_no_device(tiny_ssl, tmp_path, monkeypatch, config_class):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # not on "meta"
    # A GPU has a back end of its own.
    monkeypatch.setattr(
        "posinv.softdtw.torch_diagonal.align",
        lambda cost, *args: (cost.new_empty(len(cost)), torch.empty_like(cost)),
    )
    sizes = HubertConfig.from_pretrained(tiny_ssl).to_diff_dict()
    del sizes["model_type"]
    AutoModel.from_config(config_class(**sizes)).save_pretrained(tmp_path / "ssl")
    soundfile.write(tmp_path / "noise.wav", np.ones(1600), 16000)
    write_table(tmp_path / "wav.scp", {"noise": tmp_path / "noise.wav"})
    views = {**VIEWS, "pad": [0.1, 0.2], "noise_scp": tmp_path / "wav.scp", "snrs": [5]}
    model = SSFTModel(str(tmp_path / "ssl"), **{**LASER, "views": views}).to("meta").train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    waves, lengths, names = speech(4000, 3000, 2000)
    waves = waves.to("meta")
    model(waves, lengths.tolist(), names)  # reads the noise
    with NoWaiting():
        model(waves, lengths.tolist(), names)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_update_on_a_gpu_waits_for_nothing_and_gives_what_the_cpu_gives(laser):
    waves, lengths, names = speech(4000, 3000)
    loss = laser.eval()(waves, lengths, names)[0]
    on_gpu = laser.cuda()
    on_gpu(waves.cuda(), lengths.tolist(), names)[0].backward()  # compiles
    waves = waves.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = on_gpu(waves, lengths.tolist(), names)[0]
        result.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), loss, rtol=1e-3, atol=0)


def test_bf16_is_for_the_ssl_model_alone(laser):
    waves, lengths, names = speech(6400, 5000)
    exact, frames = laser.eval().features(waves, lengths)
    z = [torch.nn.functional.normalize(torch.randn(2, 19, 24), dim=2) for _ in range(2)]
    losses = laser.pair_losses(*z, frames, frames)
    with torch.autocast("cpu", torch.bfloat16):
        features = laser.features(waves, lengths)[0]
        for loss, same in zip(losses, laser.pair_losses(*z, frames, frames), strict=True):
            assert torch.equal(loss, same)
        assert laser(waves, lengths, names)[0].dtype == torch.float32
    assert features.dtype == torch.bfloat16
    assert (features - exact).norm() < 0.02 * exact.norm()


# ---------------------------------------------------------------------------------- what trains
def test_only_the_last_layers_and_the_projection_train(laser):
    trained = {name for name, p in laser.named_parameters() if p.requires_grad}
    layers = {name for name in trained if name.startswith("upstream.model.encoder.layers.")}
    assert trained - layers == {"projection.weight", "projection.bias"}
    assert {name.split(".")[4] for name in layers} == {"1", "2"}
    assert layers == {
        name
        for name, _ in laser.named_parameters()
        if name.startswith(("upstream.model.encoder.layers.1.", "upstream.model.encoder.layers.2."))
    }


def test_inner_layer_is_aligned_and_the_layers_up_to_it_train(tiny_ssl):
    model = SSFTModel(tiny_ssl, layer=2, trainable_layers=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[4] for name in trained if "layers" in name} == {"1"}


def test_frozen_layers_build_no_graph_and_have_no_dropout(laser):
    laser.train()
    seen = {}

    def note(name):
        return lambda module, args, output: seen.__setitem__(
            name, (module.training, (output[0] if isinstance(output, tuple) else output))
        )

    encoder = laser.upstream.model.encoder
    convolutions = laser.upstream.model.feature_extractor.conv_layers[-1]
    convolutions.register_forward_hook(note("convolutions"))
    laser.upstream.model.feature_projection.register_forward_hook(note("projection"))
    for i, layer in enumerate(encoder.layers):
        layer.register_forward_hook(note(i))
    laser(*speech(4000, 3000))
    for name in ("convolutions", "projection", 0):
        training, output = seen[name]
        assert not training
        assert not output.requires_grad
    for name in (1, 2):
        training, output = seen[name]
        assert training
        assert output.requires_grad
    assert not encoder.dropout.training


def test_trained_parameters_by_name(tiny_ssl):
    patterns = ["encoder.layers.2.*", "encoder.layer_norm.*"]
    model = SSFTModel(tiny_ssl, **LASER, trainable=patterns).train()
    model(*speech(4000, 3000))[0].backward()
    trained = {name.removeprefix("upstream.model.") for name in gradients(model)}
    norm = {"encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    assert norm < trained and {name.split(".")[2] for name in trained if "layers" in name} == {"2"}
    assert not {name for name in trained if not name.startswith(("encoder.", "projection."))}


def test_dropout_in_all_modules(tiny_ssl):
    model = SSFTModel(tiny_ssl, **LASER, dropout="all")
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())


def test_frozen_reference(tiny_ssl):
    """SCORE: the second view goes through the SSL model as it was."""
    torch.manual_seed(1)
    conf = {"reference": "frozen", "normalize_length": True, "projection_hidden": 16}
    model = SSFTModel(tiny_ssl, views=VIEWS, **conf)
    assert not [name for name in model.state_dict() if name.startswith("reference")]
    waves, lengths, names = speech(6000, 4000)
    with torch.no_grad():  # as if it had been trained
        for parameter in model.upstream.model.encoder.layers[-1].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))

    def expected(swap):
        view, view_lengths = model.perturb(waves, lengths, names)
        original, losses = AutoModel.from_pretrained(tiny_ssl).eval(), []
        for b in range(2):
            pair = [waves[b, : lengths[b]], view[b, : view_lengths[b]]]
            x, y = pair[::-1] if swap[b] else pair
            x = model.features(x[None], x.new_tensor([len(x)]).long())[0]
            y = original(y[None]).last_hidden_state.detach()
            one, _, two = model.projection
            x, y = (F.normalize(two(one(z).relu()), dim=2) for z in (x, y))
            losses.append(SoftDTWLoss(0.1)(x, y) / (x.size(1) + y.size(1)))
        return torch.cat(losses).mean()

    model.eval()
    loss = model(waves, lengths, names)[0]
    torch.testing.assert_close(loss, expected([False, False]))
    loss.backward()
    assert model.upstream.model.encoder.layers[-1].layer_norm.weight.grad.any()
    # Either view is the first in training, in validation the utterance itself.
    model.swap_views = True
    torch.testing.assert_close(model(waves, lengths, names)[0], expected([False, False]))
    model.training = True
    swaps = [[a, b] for a in (False, True) for b in (False, True)]
    found = []
    for seed in range(12):
        torch.manual_seed(seed)
        loss = model(waves, lengths, names)[0]
        [swap] = [s for s in swaps if torch.isclose(loss, expected(s), rtol=1e-4)]
        found.append(swap)
    assert len({tuple(swap) for swap in found}) == 4


def test_step_changes_the_trained_layers_alone(laser):
    before = copy.deepcopy(laser.state_dict())
    optimizer = torch.optim.AdamW(laser.parameters(), lr=1e-3)
    laser.train()(*speech(4000, 3000))[0].backward()
    optimizer.step()
    after = laser.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    layers = tuple(f"upstream.model.encoder.layers.{i}." for i in (1, 2))
    assert all(name.startswith(("projection.", *layers)) for name in changed)


def test_soft_dtw_alone_collapses_and_laser_does_not(tiny_ssl):
    spread = {}
    for name, alpha in (("soft_dtw", 0.0), ("laser", 0.4)):
        torch.manual_seed(0)
        model = SSFTModel(tiny_ssl, **{**LASER, "alpha": alpha})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        batch = speech(6400, 4800)
        for _ in range(25):
            optimizer.zero_grad()
            model.train()(*batch)[0].backward()
            optimizer.step()
        with torch.no_grad():
            spread[name] = model.eval()(*batch)[1]
    assert spread["soft_dtw"]["frame_distance"] < 0.5 * spread["laser"]["frame_distance"]
    assert spread["soft_dtw"]["effective_rank"] < spread["laser"]["effective_rank"]


def test_statistics(laser):
    batch = speech(4000, 3000)
    training = {"loss", "alignment", "regulariser"}
    assert laser.train()(*batch)[1].keys() == training
    stats = laser.eval()(*batch)[1]
    spread = {"frame_distance", "effective_rank", "ssl_frame_distance", "ssl_effective_rank"}
    assert stats.keys() == training | spread
    total = stats["alignment"] + 0.4 * stats["regulariser"]
    torch.testing.assert_close(stats["loss"], total)


def test_draws_depend_on_seed_and_utterance_alone(laser):
    laser.eval()
    waves, lengths, names = speech(4000, 3000)
    with torch.no_grad():
        torch.manual_seed(7)
        first = laser(waves, lengths, names)[0]
        torch.rand(5)
        assert torch.equal(laser(waves, lengths, names)[0], first)
        other = laser(waves, lengths, ["other", "names"])[0]
    assert not torch.equal(other, first)


def test_saved_model_gives_the_tuned_features(laser, tmp_path):
    with torch.no_grad():
        for parameter in laser.upstream.model.encoder.layers[-1].parameters():
            parameter.add_(0.01)
        laser.eval().save_pretrained(tmp_path / "tuned")
        waves, lengths, _ = speech(4000)
        loaded = AutoModel.from_pretrained(tmp_path / "tuned").eval()
        features = laser.features(waves, lengths)[0]
        torch.testing.assert_close(loaded(waves).last_hidden_state, features, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"layer": 9}, "layer 9 is out of range"),
        ({"trainable_layers": 0}, "trainable_layers must be 1 to 3"),
        ({"trainable_layers": 4}, "trainable_layers must be 1 to 3"),
        ({"loss": "dtw"}, "loss must be one of soft_dtw, mse"),
        ({"loss": "mse", "views": VIEWS}, "views of equal length"),
        ({"loss": "mse", "views": {"pad": [0.1, 0.2]}}, "views of equal length"),
        ({"loss": "mse", "normalize_length": True}, "normalize_length is for the loss soft_dtw"),
        ({"views": {"sped": [1.1]}}, "views: .*sped"),
        ({"reference": "other"}, "reference must be one of tuned, frozen"),
        ({"dropout": "none"}, "dropout must be trained or all"),
        ({"trainable": ["encoder.layers.9.*"]}, "'encoder.layers.9.*' matches no parameter"),
        ({"layer": 2, "trainable": ["encoder.*"]}, "encoder.layers.2.* is above the aligned"),
        ({"gamma": -1.0}, "gamma"),
        ({"margin": -1.0}, "margin"),
    ],
)
def test_bad_configuration(tiny_ssl, conf, message):
    with pytest.raises(InputError, match=message):
        SSFTModel(tiny_ssl, **conf)


def test_view_shorter_than_a_frame_is_named(tiny_ssl):
    model = SSFTModel(tiny_ssl, views={"speed": [2.0]})
    with pytest.raises(InputError, match="utterance utt1: a view of 300 samples"):
        model(*speech(4000, 600))


# ----------------------------------------------------------------------------- task and presets
def task_args(tmp_path, *options):
    return SSFTTask.get_parser().parse_args(["--output_dir", str(tmp_path), *map(str, options)])


def test_method_file_counts_over_model_conf_and_is_written_back(tiny_ssl, tmp_path):
    method = tmp_path / "method.yaml"
    method.write_text("{alpha: 0.7, views: {semitones: [1]}}")
    args = task_args(tmp_path, "--ssl", tiny_ssl, "--method_file", method)
    assert SSFTTask.build_model(args).alpha == 0.7
    method.unlink()
    assert SSFTTask.build_model(args).alpha == 0.7


@pytest.mark.parametrize("text", ["[1, 2]", "{alfa: 1}", "a: b: c"])
def test_bad_method_file(tiny_ssl, tmp_path, text):
    method = tmp_path / "method.yaml"
    method.write_text(text)
    args = task_args(tmp_path, "--ssl", tiny_ssl, "--method_file", method)
    with pytest.raises(InputError, match=r"method\.yaml|alfa"):
        SSFTTask.build_model(args)


@pytest.fixture
def corpus(tmp_path):
    """Four utterances of noise of different lengths, and their lists."""
    lengths = {f"u{k}": 4000 + 700 * k for k in range(4)}
    for k, (name, length) in enumerate(lengths.items()):
        wave = 0.1 * np.random.default_rng(k).standard_normal(length)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000)
    write_table(tmp_path / "wav.scp", {name: tmp_path / f"{name}.wav" for name in lengths})
    write_table(tmp_path / "shape", {name: str(length) for name, length in lengths.items()})
    return tmp_path


def train(corpus, ssl, out, epochs, **conf):
    config = {
        "ssl": ssl,
        "model_conf": LASER,
        "optim": "adamw",
        "optim_conf": {"lr": 1e-3},
        "batch_type": "sorted",
        "batch_size": 2,
        "keep_nbest_models": 1,
        "best_model_criterion": [["valid", "loss", "min"]],
        "num_att_plot": 0,
        "use_matplotlib": False,
        "use_tensorboard": False,
        "num_workers": 0,
        "seed": 3,
        **conf,
    }
    (corpus / "train.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(corpus / "train.yaml"), "--output_dir", str(out), "--ngpu", "0"]
    for part in ("train", "valid"):
        options += [f"--{part}_data_path_and_name_and_type", f"{corpus / 'wav.scp'},speech,sound"]
        options += [f"--{part}_shape_file", str(corpus / "shape")]
    SSFTTask.main(cmd=[*options, "--max_epoch", str(epochs), "--resume", "true"])


def test_resumed_training_gives_what_an_unbroken_one_gives(corpus, tiny_ssl):
    schedule = {"max_lr": 1e-3, "total_steps": 6, "cycle_momentum": False}
    conf = {"scheduler": "onecyclelr", "scheduler_conf": schedule}
    # What TensorBoard shows changes nothing.
    train(corpus, tiny_ssl, corpus / "whole", 3, use_tensorboard=True, **conf)
    train(corpus, tiny_ssl, corpus / "resumed", 1, **conf)
    train(corpus, tiny_ssl, corpus / "resumed", 3, **conf)
    whole, resumed = (
        torch.load(corpus / run / "3epoch.pth", weights_only=True) for run in ("whole", "resumed")
    )
    losses = [[e["train"]["loss"] for e in read_epochs(corpus / r)] for r in ("whole", "resumed")]
    assert losses[0] == losses[1]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    assert not (corpus / "resumed" / "tensorboard").exists()
    shown = {}
    for part in ("train", "valid"):
        shown[part] = EventAccumulator(str(corpus / "whole" / "tensorboard" / part))
        shown[part].Reload()
    parts = {"loss", "alignment", "regulariser"}
    assert parts | {"grad_norm"} <= set(shown["train"].Tags()["scalars"])
    assert parts | {"ssl_frame_distance", "ssl_effective_rank"} <= set(
        shown["valid"].Tags()["scalars"]
    )
    images = shown["train"].Images("alignment/distance, soft alignment")
    assert [image.step for image in images] == [2, 4, 6]  # two updates in each epoch
    assert shown["train"].Tags()["audio"] == ["speech/1 utterance", "speech/2 perturbed"]
    [heard, *_] = shown["train"].Audio("speech/1 utterance")
    assert heard.sample_rate == 16000
    assert heard.length_frames in [4000 + 700 * k for k in range(4)]


def test_validation_draws_the_same_every_epoch_and_training_does_not(corpus, tiny_ssl):
    train(corpus, tiny_ssl, corpus / "still", 3, optim_conf={"lr": 0.0})
    epochs = read_epochs(corpus / "still")
    assert len({epoch["valid"]["loss"] for epoch in epochs}) == 1
    assert len({epoch["train"]["loss"] for epoch in epochs}) == 3


# The papers' settings, which conf/*.yaml must have.
LASER_OPTIM = {"lr": 2e-5, "warmup": 1000, "updates": 3600, "pairs": 8, "clip": 1}
PRESETS = {
    "laser_hubert": (1.1, 0.4, [0.9, 1.0, 1.1], [-2, 2]),
    "laser_wavlm": (1.0, 0.15, [0.8, 0.85, 0.9, 1.0, 1.1, 1.15, 1.2], [-2, 2]),
    "nrssft_hubert": (1.1, 0.4, [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2], None),
    "nrssft_wavlm": (1.0, 0.15, [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2], None),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_settings(name, tiny_ssl, tmp_path, request):
    path = request.config.rootpath / "conf" / f"{name}.yaml"
    args = task_args(tmp_path, "--config", path, "--ssl", tiny_ssl)
    margin, alpha, speed, semitones = PRESETS[name]
    conf = args.model_conf
    assert (conf["margin"], conf["alpha"], conf["gamma"], conf["window"]) == (margin, alpha, 0.1, 0)
    assert (conf["trainable_layers"], conf["projection_size"], conf["layer"]) == (2, 256, -1)
    assert conf["views"]["speed"] == speed
    assert conf["views"].get("semitones") == semitones
    assert conf["views"].get("snrs") == (None if semitones else [5, 10, 20])
    assert args.batch_size == LASER_OPTIM["pairs"]
    assert args.grad_clip == LASER_OPTIM["clip"]
    assert args.max_epoch * args.num_iters_per_epoch == LASER_OPTIM["updates"]
    if semitones:  # the others need noise recordings
        assert SSFTTask.build_model(args).alpha == alpha

    # The learning rate over the updates: linear up to the 1,000th, linear down to the last.
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([weight], **args.optim_conf)
    scheduler = scheduler_classes[args.scheduler](optimizer, **args.scheduler_conf)
    rates = []
    for _ in range(LASER_OPTIM["updates"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    warmup = LASER_OPTIM["warmup"]
    assert rates[warmup - 1] == pytest.approx(LASER_OPTIM["lr"], rel=1e-4)
    assert max(rates) <= LASER_OPTIM["lr"] * (1 + 1e-6)
    assert rates[warmup // 2 - 1] == pytest.approx(LASER_OPTIM["lr"] / 2, rel=5e-3)
    assert rates[(warmup + 3600) // 2 - 1] == pytest.approx(LASER_OPTIM["lr"] / 2, rel=5e-3)
    assert rates[0] < 2e-3 * LASER_OPTIM["lr"]
    assert rates[-1] < 2e-3 * LASER_OPTIM["lr"]


RELEASED = {
    "laser_hubert": (0.4, 1.1, [0.9, 1.0, 1.1]),
    "laser_wavlm": (0.15, 1.0, [0.8, 0.85, 0.9, 1.0, 1.1, 1.15, 1.2]),
    "nrssft_hubert": (0.4, 1.1, [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]),
    "nrssft_wavlm": (0.15, 1.0, [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]),
    "score_hubert": (0.0, None, [0.9, 1.0, 1.1]),
    "score_wavlm": (0.0, None, [0.85, 0.9, 1.0, 1.1, 1.15]),
}


@pytest.fixture(scope="module")
def ssl_of_12_layers(tmp_path_factory):
    """A folder with a random HuBERT of 12 layers without dropout."""
    folder = tmp_path_factory.mktemp("12 layers")
    torch.manual_seed(8)
    off = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
    )
    config = HubertConfig(**{**TINY_SSL, "num_hidden_layers": 12}, **off)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def released(name, ssl, tmp_path, request, *options):
    path = request.config.rootpath / "conf" / f"{name}_released.yaml"
    return task_args(tmp_path, "--config", path, "--ssl", ssl, *options)


@pytest.mark.parametrize("name", RELEASED)
def test_released_presets(name, ssl_of_12_layers, tmp_path, request):
    args = released(name, ssl_of_12_layers, tmp_path, request)
    conf = args.model_conf
    alpha, margin, speed = RELEASED[name]
    assert (conf["alpha"], conf.get("margin"), conf["views"]["speed"]) == (alpha, margin, speed)
    assert (conf["gamma"], conf["projection_size"], conf["dropout"]) == (0.1, 256, "all")
    updates = args.max_epoch * args.num_iters_per_epoch / args.accum_grad
    assert (args.batch_size * args.accum_grad, updates) == (8, 3600)
    assert args.scheduler_conf == {"warmup_steps": 1000, "total_steps": 3600}
    assert (args.optim_conf["weight_decay"], args.optim_conf["eps"]) == (0.0, 1e-7)
    if "noise_scp" in conf["views"]:
        assert sorted(conf["views"]["snrs"]) == [5, 10, 20]
        del conf["views"]["noise_scp"], conf["views"]["snrs"]
    model = SSFTTask.build_model(args)
    trained = [n for n, p in model.upstream.model.named_parameters() if p.requires_grad]
    groups = {".".join(n.split(".")[: 3 if "layers" in n else 2]) for n in trained}
    layers = {"encoder.layers.10", "encoder.layers.11", "encoder.layer_norm"}
    score = {"feature_projection.layer_norm"} if name.startswith("score") else set()
    assert groups == layers | score


@pytest.mark.parametrize("loss", ["soft_dtw", "mse"])
def test_an_update_of_the_released_code(loss, ssl_of_12_layers, tmp_path, request):
    """Loss, gradient and update, by their formulas, in float64 and utterance by utterance."""
    views = "{semitones: [-2, 2], phase_locking: false}"
    options = ("--model_conf", f"views={views}", "--model_conf", f"loss={loss}")
    args = released("laser_hubert", ssl_of_12_layers, tmp_path, request, *options)
    torch.manual_seed(4)
    model = SSFTTask.build_model(args).train()
    [optimizer] = SSFTTask.build_optimizers(args, model)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    waves, lengths, names = speech(9000, 6000)
    view, view_lengths = model.perturb(waves, lengths, names)

    oracle = AutoModel.from_pretrained(ssl_of_12_layers).double().eval()
    weight, bias = (before[f"projection.{part}"].requires_grad_() for part in ("weight", "bias"))
    losses = []
    for pair in zip(waves, lengths, view, view_lengths, strict=True):
        hidden = [
            oracle(w[None, :n].double()).last_hidden_state[0] for w, n in (pair[:2], pair[2:])
        ]
        x, y = (F.normalize(h @ weight.T + bias, dim=1) for h in hidden)
        losses.append(released_loss(x, y, loss))
    expected = torch.stack(losses).mean()
    expected.backward()

    found = model(speech=waves, speech_lengths=lengths, utt_id=names)[0]
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = {f"upstream.model.{n}": p for n, p in oracle.named_parameters()}
    wanted |= {"projection.weight": weight, "projection.bias": bias}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {"upstream.model.encoder.layer_norm.weight", "projection.weight"} < trained.keys()
    norm = torch.stack([wanted[n].grad.norm() for n in trained]).norm()
    difference = [(p.grad - wanted[n].grad).norm() for n, p in trained.items()]
    assert torch.stack(difference).norm() < 1e-4 * norm

    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    optimizer.step()
    assert norm > args.grad_clip
    rate = args.optim_conf["lr"]
    for n, p in trained.items():
        gradient = wanted[n].grad / norm
        # Adam's first update, epsilon added before the correction of the second moment.
        step = math.sqrt(1e-3) * gradient / (math.sqrt(1e-3) * gradient.abs() + 1e-7)
        change = (p.double() - before[n]) / rate
        # float32 parameters are near 1, and the change is 2e-5.
        assert (change + step).abs().max() < 0.02, n


def released_loss(x, y, loss):
    """LASER's loss of one pair of L2-normalised sequences, by differences and loops."""
    gamma, alpha, margin = 0.1, 0.4, 1.1

    def soft_dtw(x, y):
        cost = (x[:, None] - y).square().sum(2)
        r = {(-1, -1): x.new_zeros(())}
        for i in range(len(x)):
            for j in range(len(y)):
                before = [r[k] for k in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if k in r]
                r[i, j] = cost[i, j] - gamma * torch.logsumexp(-torch.stack(before) / gamma, 0)
        return r[len(x) - 1, len(y) - 1]

    def idm(z):
        i = torch.arange(len(z))
        lag = (i[:, None] - i).abs()
        far = lag > 0
        distance = ((z[:, None] - z).square().sum(2) + ~far).sqrt() * far
        return ((lag**2 + 1) * (margin - distance).clamp(min=0) * far).sum() / len(z) ** 2

    alignment = (
        soft_dtw(x, y) - 0.5 * (soft_dtw(x, x) + soft_dtw(y, y))
        if loss == "soft_dtw"
        else (x - y).square().sum()
    )
    return alignment + alpha * (idm(x) + idm(y))


def test_small_methods_build(tiny_ssl, tmp_path, request):
    small = request.config.rootpath / "conf" / "small"
    config = small / "ssft.yaml"
    for method in sorted((small / "methods").glob("*.yaml")):
        args = task_args(tmp_path, "--config", config, "--ssl", tiny_ssl, "--method_file", method)
        SSFTTask.build_model(args)
    schedule = yaml.safe_load(config.read_text())
    updates = schedule["max_epoch"] * schedule["num_iters_per_epoch"]
    assert schedule["scheduler_conf"]["total_steps"] == updates
