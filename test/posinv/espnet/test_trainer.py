"""Trainings that stop being finite, or lack a GPU; checkpoints that hold more than tensors."""

import os

import pytest
import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel

from posinv.bin.ctc_inference import Head
from posinv.errors import InputError
from posinv.espnet.tasks.ssft import SSFTTask
from posinv.espnet.trainer import NonFiniteWatch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, utt_id):
        loss = self.linear(x).sum().log()
        return loss, {}, 1


class NoGradient(Net):
    """Its gradient isn't finite where the loss is."""

    def forward(self, x, utt_id):
        y = self.linear(x).sum()
        return (y * 0).sqrt() if y < 0 else y, {}, 1


def loop(tmp_path, batches, allowed, accum_grad=1, epochs=1, kind=Net):
    """Train as ESPnet does: an update whose gradient is not finite is left out.

    Net's gradient is finite where its loss isn't.
    """
    model = kind()
    torch.nn.init.ones_(model.linear.weight)
    torch.nn.init.zeros_(model.linear.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    watch = NonFiniteWatch(model, [optimizer], allowed, accum_grad, tmp_path / "nonfinite.txt")
    for _ in range(epochs):
        optimizer.zero_grad()
        watch.begin_epoch()
        for i, value in enumerate(batches, 1):
            loss, *_ = model(x=torch.tensor([[value]]), utt_id=[f"utt{i}"])
            loss.backward()
            if i % accum_grad == 0:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if norm.isfinite():
                    optimizer.step()
                optimizer.zero_grad()
        watch.check()
    return model


@pytest.mark.parametrize("kind", [Net, NoGradient])
@pytest.mark.parametrize("allowed", [0, 2])
def test_updates_in_a_row_that_are_left_out(tmp_path, allowed, kind):
    good, bad = 1.0, -1.0  # of which there is no logarithm
    loop(tmp_path, [good, *[bad] * allowed, good, *[bad] * allowed], allowed, kind=kind)
    assert not (tmp_path / "nonfinite.txt").exists()
    with pytest.raises(InputError) as error:
        loop(tmp_path, [good, *[bad] * (allowed + 1), good], allowed, kind=kind)
    said = f"{allowed + 1} updates in a row had no finite loss and gradient, the last of the utt"
    assert str(error.value).startswith(said)
    where = (
        "all modules' outputs are finite: the loss" if kind is Net else "the loss is finite; the"
    )
    assert f"utt{allowed + 2}: {where}" in str(error.value)
    report = (tmp_path / "nonfinite.txt").read_text()
    assert [f"batch: utt{i}" in report for i in range(1, allowed + 4)] == [
        *(False, *[True] * (allowed + 1), False)
    ]


def test_batches_of_one_update_count_once(tmp_path):
    batches = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0]
    loop(tmp_path, batches, allowed=2, accum_grad=2, epochs=1)
    with pytest.raises(InputError, match=r"2 updates in a row .* utterances utt3, utt4: "):
        loop(tmp_path, batches, allowed=1, accum_grad=2)
    # the batch that the end of an epoch leaves over belongs to no update
    loop(tmp_path, [1.0, 1.0, -1.0], allowed=0, accum_grad=2, epochs=3)


# --------------------------------------------------------------------- ESPnet's own trainer

TRAINING = {
    "optim": "sgd", "max_epoch": 2, "batch_type": "sorted", "batch_size": 2, "num_workers": 0,
    "best_model_criterion": [["valid", "loss", "min"]], "use_matplotlib": False,
    "use_tensorboard": False, "model_conf": {"projection_size": 4, "trainable_layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def ssl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssl")
    torch.manual_seed(0)
    HubertModel(HubertConfig(**TINY_SSL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_utterances):
    folder = tmp_path_factory.mktemp("data")
    write_utterances(folder, 6)
    return folder


@pytest.fixture
def train(ssl, data, tmp_path):
    def run(config=(), *options):
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAINING | dict(config)))
        command = ["--config", tmp_path / "train.yaml", "--output_dir", tmp_path / "exp"]
        for part in ("train", "valid"):
            command += [f"--{part}_data_path_and_name_and_type", f"{data / 'wav.scp'},speech,sound"]
            command += [f"--{part}_shape_file", data / "shape"]
        SSFTTask.main(cmd=[*map(str, command), "--ssl", str(ssl), *map(str, options)])

    run.folder = tmp_path / "exp"
    return run


def test_a_training_that_diverges_ends_with_names(train):
    """The first update makes the weights infinite."""
    config = {"optim_conf": {"lr": 1e38}, "grad_clip": 1e30}
    with pytest.raises(InputError) as error:
        train(config, "--nonfinite_updates", 1)
    message = str(error.value)
    assert "2 updates in a row had no finite loss and gradient" in message and "utt" in message
    assert "is not finite itself" in message or "the first module with such a value is" in message
    report = (train.folder / "nonfinite.txt").read_text()
    assert report.count("batch: utt") == 2
    assert not (train.folder / "valid.loss.best.pth").exists()


def test_an_epoch_without_an_update_is_no_finished_training(train):
    """ESPnet ends such a training with exit status 0."""
    infinite = {"model_conf": TRAINING["model_conf"] | {"alpha": 1e39}}
    with pytest.raises(InputError, match="3 updates in a row had no finite loss and gradient"):
        train({"optim_conf": {"lr": 1e-3}, **infinite})
    with pytest.raises(InputError, match="an epoch of 3 batches makes no update of accum_grad 9"):
        train({"optim_conf": {"lr": 1e-3}, "accum_grad": 9})


@pytest.mark.parametrize("value", [-1])
def test_bad_numbers_of_updates(train, value):
    with pytest.raises(
        InputError, match=rf"--nonfinite_updates {value}: a whole number, at least 0"
    ):
        train({"nonfinite_updates": value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_where_one_is_asked_for(train):
    with pytest.raises(InputError, match="--ngpu 1: no GPU here"):
        train({}, "--ngpu", 1)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_that_hold_code(train, tmp_path, monkeypatch):
    """Also where the variable by which ESPnet would run it is set."""
    monkeypatch.setenv("ESPNET_ALLOW_UNSAFE_TORCH_LOAD", "1")
    bad = tmp_path / "bad.pth"
    torch.save({"x": Evil(tmp_path / "pwned")}, bad)
    with pytest.raises(InputError, match=r"bad\.pth: not tensors alone"):
        train({}, "--init_param", f"{bad}:encoder:encoder")
    train.folder.mkdir(exist_ok=True)
    bad.rename(train.folder / "checkpoint.pth")
    with pytest.raises(InputError, match=r"checkpoint\.pth: not tensors alone"):
        train({}, "--resume", "true")
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.yaml").write_text("{}")
    (train.folder / "checkpoint.pth").rename(head / "valid.cer_ctc.best.pth")
    with pytest.raises(InputError, match=r"best\.pth: not tensors alone"):
        Head(head, "valid.cer_ctc.best.pth", "cpu")
    assert not (tmp_path / "pwned").exists()
