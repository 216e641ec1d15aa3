"""Training over several processes, accumulated gradients, mixed precision, and resumed training.

Dropout is off: its draws come from torch's generator, and so depend on how a batch is split.
"""

import json
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from posinv.errors import InputError
from posinv.espnet.tasks.asr import ASRTask
from posinv.espnet.tasks.enh import EnhancementTask
from posinv.espnet.tasks.pretrain import PretrainTask
from posinv.espnet.tasks.ssft import SSFTTask
from posinv.report.curves import read_epochs
from posinv.ssl.load import frame_lengths, load_config

TASKS = {"enh": EnhancementTask, "ssft": SSFTTask, "asr": ASRTask, "pretrain": PretrainTask}
TYPES = {
    "enh": {"wav.scp": "speech_mix,sound", "spk1.scp": "speech_ref1,sound"},
    "ssft": {"wav.scp": "speech,sound"},
    "asr": {"wav.scp": "speech,sound", "text": "text,text"},
    "pretrain": {"wav.scp": "speech,sound", "units": "units,text_int"},
}
UTTERANCES = 10
LONG = {"max_epoch": 25, "accum_grad": 2, "keep_nbest_models": 25}
# Each process runs all trainings, since its start takes longer than they do.
RUN_JOB = """
from posinv.espnet.tasks import asr, enh, pretrain, ssft
tasks = {"enh": enh.EnhancementTask, "ssft": ssft.SSFTTask, "asr": asr.ASRTask,
         "pretrain": pretrain.PretrainTask}
run_job = lambda options: tasks[options[0]].main(cmd=options[1:])
"""


@pytest.fixture(scope="module")
def ssl_folder(tiny_ssl, tmp_path_factory):
    """The tiny SSL model without dropout."""
    folder = tmp_path_factory.mktemp("still") / "ssl"
    shutil.copytree(tiny_ssl, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def corpus(ssl_folder, tmp_path_factory, write_utterances):
    """A folder with noisy and clean utterances of different lengths, their words and units."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lists = {"text": "", "units": ""}
    for i, length in enumerate(write_utterances(folder, UTTERANCES)):
        lists["text"] += f"utt{i} {'a b c'[: 1 + 2 * (i % 3)]}\n"
        frames = int(frame_lengths(load_config(str(ssl_folder)), torch.tensor([length])))
        lists["units"] += f"utt{i} {' '.join(map(str, rng.integers(5, size=frames)))}\n"
    for name, text in lists.items():
        (folder / name).write_text(text)
    (folder / "tokens").write_text("<blank>\n<unk>\na\nb\nc\n<sos/eos>\n")
    return folder


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    return tmp_path_factory.mktemp("exp")


@pytest.fixture(scope="module")
def options(ssl_folder, corpus, exp):
    """A function of task, name and changes: the options of a training in exp/<task>/<name>."""
    criterion = {"name": "ssl_softdtw", "conf": {}, "wrapper": "fixed_order"}
    hubert = yaml.safe_load((ssl_folder / "config.json").read_text())
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes += ("conv_dim", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups")
    still = {name: 0.0 for name in hubert if name.endswith("_dropout") and name != "final_dropout"}
    confs = {
        "enh": {
            "ssl": str(ssl_folder),
            **{"encoder": "same", "decoder": "same", "separator": "demucs"},
            "separator_conf": {"hidden": 4, "depth": 2, "resample": 1},
            "criterions": [{**criterion, "wrapper_conf": {"weight": 1.0}}],
        },
        "ssft": {
            "ssl": str(ssl_folder),
            "model_conf": {
                **{"projection_size": 8, "alpha": 0.4},
                "views": {"speed": [0.9, 1.0, 1.1], "semitones": [-2, 2]},
            },
        },
        "asr": {
            **{"token_type": "word", "token_list": str(corpus / "tokens"), "normalize": None},
            **{"frontend": "ssl", "frontend_conf": {"ssl": str(ssl_folder)}, "encoder": "rnn"},
            "encoder_conf": {"num_layers": 1, "hidden_size": 8, "output_size": 8, "dropout": 0.0},
            "model_conf": {"ctc_weight": 1.0},
        },
        "pretrain": {
            "num_units": 5,
            "ssl_conf": {name: hubert[name] for name in sizes} | still,
            "model_conf": {"unmasked_weight": 0.5},
        },
    }

    def make(task, name, **changes):
        config = confs[task] | {
            **{"optim": "sgd", "optim_conf": {"lr": 0.02}, "max_epoch": 3, "seed": 3},
            **{"batch_type": "sorted", "batch_size": 5, "num_workers": 0},
            **{"keep_nbest_models": 9, "best_model_criterion": [["valid", "loss", "min"]]},
            **{"use_matplotlib": False, "use_tensorboard": False, "num_att_plot": 0},
            **{"output_dir": str(exp / task / name), "resume": True},
            **changes,
        }
        out = exp / f"{task} {name}.yaml"
        out.write_text(yaml.safe_dump(config))
        cmd = ["--config", str(out)]
        for part in ("train", "valid"):
            for file, kind in TYPES[task].items():
                cmd += [f"--{part}_data_path_and_name_and_type", f"{corpus / file},{kind}"]
            cmd += [f"--{part}_shape_file", str(corpus / "shape")]
        return cmd

    return make


@pytest.fixture(scope="module")
def ranks(exp, ranks_of):
    return ranks_of(exp, RUN_JOB)


def curve(folder):
    epochs = read_epochs(folder)
    keys = [("train", "loss"), ("train", "grad_norm"), ("valid", "loss")]
    return np.array([[epoch[part][name] for part, name in keys] for epoch in epochs])


def weights(folder, epoch=3):
    return torch.load(folder / f"{epoch}epoch.pth", weights_only=True)


def assert_same(first, second):
    """Equal losses and gradients in every epoch, and equal final weights, up to rounding."""
    np.testing.assert_allclose(curve(first), curve(second), rtol=2e-5)
    torch.testing.assert_close(weights(first), weights(second), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def two(options, ranks):
    """All uninterrupted trainings with two processes."""
    jobs = [[task, *options(task, "two")] for task in TASKS]
    ranks.finish(ranks.start([*jobs, ["enh", *options("enh", "long", **LONG)]]))


def test_two_processes_are_one_with_twice_the_batch(exp, options, two):
    """Two processes split a batch of 5 into 3 and 2."""
    for name, task in TASKS.items():
        task.main(cmd=options(name, "one"))
        assert_same(exp / name / "one", exp / name / "two")
        losses = curve(exp / name / "one")
        assert losses.shape == (3, 3)
        assert abs(losses[0, 0] / losses[2, 0] - 1) > 1e-3  # the model learns
        config = yaml.safe_load((exp / name / "two" / "config.yaml").read_text())
        assert config["distributed"] is True


@pytest.mark.parametrize("name", ["enh", "ssft", "asr"])
def test_accumulated_gradients_are_those_of_the_whole_batch(exp, options, name):
    TASKS[name].main(cmd=options(name, "whole", batch_size=UTTERANCES))
    TASKS[name].main(cmd=options(name, "parts", accum_grad=2))
    assert_same(exp / name / "whole", exp / name / "parts")


def test_left_over_gradients_go_with_the_epoch(exp, options):
    """With three batches in an epoch and two in an update, a resumed run equals an unbroken one."""
    conf = {"batch_size": 3, "accum_grad": 2}
    SSFTTask.main(cmd=options("ssft", "unbroken", **conf))
    SSFTTask.main(cmd=options("ssft", "broken", max_epoch=1, **conf))
    SSFTTask.main(cmd=options("ssft", "broken", **conf))
    first, second = (weights(exp / "ssft" / name) for name in ("unbroken", "broken"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_killed_and_resumed_over_two_processes(exp, options, ranks, two):
    """A run killed at any time, with accumulated gradients, resumes at its last whole epoch."""
    killed, epochs = exp / "enh" / "killed", LONG["max_epoch"]
    job = [["enh", *options("enh", "killed", **LONG)]]
    processes = ranks.start(job)
    while not (killed / "3epoch.pth").exists():
        time.sleep(0.01)
        assert processes[0].poll() is None, ranks.said(0)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # An epoch's weights get their final name before its checkpoint does: the third may lack one.
    assert 2 <= len(read_epochs(killed)) < epochs
    ranks.finish(ranks.start(job))
    np.testing.assert_array_equal(curve(exp / "enh" / "long"), curve(killed))
    first, second = (weights(exp / "enh" / name, epochs) for name in ("long", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", TASKS)
def test_bf16_trains(exp, options, name, monkeypatch):
    """What ESPnet's --use_amp does on a GPU, with the CPU's autocast."""
    conf = {"max_epoch": 1, "batch_size": UTTERANCES}
    TASKS[name].main(cmd=options(name, "single", **conf))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    monkeypatch.setattr("espnet2.train.trainer.autocast", lambda *_, **__: autocast())
    TASKS[name].main(cmd=options(name, "bf16", **conf))
    single, half = (curve(exp / name / kind) for kind in ("single", "bf16"))
    assert not np.array_equal(single, half)
    # bf16 changes SSL features by 1.5 %, and their squared distances by twice that.
    np.testing.assert_allclose(half[:, [0, 2]], single[:, [0, 2]], rtol=0.04)
    assert {w.dtype for w in weights(exp / name / "bf16", 1).values()} == {torch.float32}


@pytest.mark.parametrize("name", TASKS)
def test_other_products_train(exp, options, name):
    conf = {"max_epoch": 1, "batch_size": UTTERANCES}
    for precision in ("medium", "highest"):
        conf["float32_matmul_precision"] = precision
        TASKS[name].main(cmd=options(name, precision, **conf))
        assert torch.get_float32_matmul_precision() == precision
    highest, medium = (curve(exp / name / kind) for kind in ("highest", "medium"))
    np.testing.assert_allclose(medium[:, [0, 2]], highest[:, [0, 2]], rtol=0.04)  # as bf16


def test_what_is_refused(options):
    with pytest.raises(InputError, match="--use_amp true: mixed precision needs a GPU"):
        SSFTTask.main(cmd=[*options("ssft", "x"), "--use_amp", "true"])
    with pytest.raises(InputError, match="must be one of highest, high, medium: 'low'"):
        SSFTTask.main(cmd=options("ssft", "x", float32_matmul_precision="low"))
    both = ["--use_tf32", "true", "--float32_matmul_precision", "high"]
    with pytest.raises(InputError, match="--use_tf32 and --float32_matmul_precision: give one"):
        SSFTTask.main(cmd=[*options("ssft", "x"), *both])
