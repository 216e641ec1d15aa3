import os
import re
import socket
import subprocess

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posinv.errors import InputError
from posinv.espnet.tasks.enh import EnhancementTask

DEMUCS = {"hidden": 4, "depth": 2, "resample": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_utterances):
    """Options for 8 short noisy and clean utterances of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    write_utterances(folder, 8)
    options = []
    for part in ("train", "valid"):
        options += [
            f"--{part}_data_path_and_name_and_type",
            f"{folder}/wav.scp,speech_mix,sound",
            f"--{part}_data_path_and_name_and_type",
            f"{folder}/spk1.scp,speech_ref1,sound",
            f"--{part}_shape_file",
            f"{folder}/shape",
        ]
    return options


def write_config(folder, **changes):
    config = {
        "encoder": "same",
        "decoder": "same",
        "separator": "demucs",
        "separator_conf": DEMUCS,
        "criterions": [
            {
                "name": "ssl_mse_pad",
                "conf": {},
                "wrapper": "fixed_order",
                "wrapper_conf": {"weight": 1.0},
            }
        ],
        "optim": "adam",
        "optim_conf": {"lr": 0.001},
        "max_epoch": 2,
        "batch_type": "sorted",
        "batch_size": 2,
        "num_workers": 0,
        "keep_nbest_models": 2,
        "best_model_criterion": [["valid", "loss", "min"]],
        "use_matplotlib": False,
        "use_tensorboard": False,
        "log_interval": 1,
        **changes,
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def enh_train(python):
    """Start a training."""

    def start(*options, **environment):
        return subprocess.Popen(
            [*python, "-m", "posinv.bin.enh_train", *map(str, options)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def weights(folder, epoch):
    return torch.load(folder / f"{epoch}epoch.pth", weights_only=True)


def test_resumed_run_is_the_unbroken_one(enh_train, tmp_path, data, tiny_ssl):
    config = write_config(tmp_path)
    options = ["--config", config, "--ssl", tiny_ssl, *data, "--resume", "true", "--output_dir"]
    # What TensorBoard shows changes nothing.
    log = finish(enh_train(*options, tmp_path / "unbroken", "--use_tensorboard", "true"))
    finish(enh_train(*options, tmp_path / "broken", "--max_epoch", 1))
    assert "The training was resumed" in finish(enh_train(*options, tmp_path / "broken"))
    first, second = (weights(tmp_path / name, 2) for name in ("unbroken", "broken"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    losses = re.findall(r"\[valid\] .*?ssl_mse_pad=([\d.e+-]+)", log)
    assert len(losses) == 2
    # Only the separator is in the checkpoint.
    assert first
    assert all(key.startswith("separator.") for key in first)
    # The saved configuration names the SSL model.
    saved = yaml.safe_load((tmp_path / "unbroken" / "config.yaml").read_text())
    assert saved["criterions"][0]["conf"]["ssl"] == tiny_ssl

    shown = EventAccumulator(str(tmp_path / "unbroken" / "tensorboard" / "train"))
    shown.Reload()
    assert {"loss", "ssl_mse_pad", "grad_norm"} <= set(shown.Tags()["scalars"])
    assert len(shown.Images("alignment/distance, soft alignment")) == 2
    speech = ["speech/1 noisy", "speech/2 enhanced", "speech/3 clean"]
    assert shown.Tags()["audio"] == speech
    assert len({shown.Audio(name)[0].length_frames for name in speech}) == 1
    # The model changes from one validation to the next, the noisy speech does not.
    noisy, enhanced = (
        {audio.encoded_audio_string for audio in shown.Audio(name)} for name in speech[:2]
    )
    assert (len(noisy), len(enhanced)) == (1, 2)


def test_two_processes_on_cpu(enh_train, tmp_path, data, tiny_ssl):
    config = write_config(tmp_path, max_epoch=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        enh_train(
            "--config",
            config,
            "--ssl",
            tiny_ssl,
            *data,
            "--output_dir",
            tmp_path / "exp",
            "--ngpu",
            0,
            "--dist_backend",
            "gloo",
            "--dist_world_size",
            2,
            "--dist_rank",
            rank,
            "--dist_master_addr",
            "127.0.0.1",
            "--dist_master_port",
            port,
        )
        for rank in range(2)
    ]
    logs = [finish(process) for process in processes]
    assert "[train]" in logs[0]
    assert "ssl_mse_pad=" in logs[0]
    assert (tmp_path / "exp" / "1epoch.pth").exists()


@pytest.mark.parametrize(
    "separator, conf, encoder, encoder_conf",
    [
        (
            "tcn",
            {"num_spk": 1, "layer": 2, "stack": 1, "bottleneck_dim": 8, "hidden_dim": 8},
            "conv",
            {"channel": 8, "kernel_size": 16, "stride": 8},
        ),
        ("rnn", {"num_spk": 1, "layer": 1, "unit": 8}, "stft", {"n_fft": 256, "hop_length": 128}),
    ],
)
def test_beside_espnets_separators_and_criteria(
    tmp_path, data, tiny_ssl, separator, conf, encoder, encoder_conf
):
    wrapped = {"wrapper": "fixed_order", "wrapper_conf": {"weight": 0.5}}
    config = write_config(
        tmp_path,
        separator=separator,
        separator_conf=conf,
        encoder=encoder,
        encoder_conf=encoder_conf,
        decoder=encoder,
        decoder_conf=encoder_conf,
        criterions=[
            {"name": name, "conf": {}, **wrapped} for name in ("ssl_softdtw", "ssl_xcorr", "si_snr")
        ],
        max_epoch=1,
    )
    EnhancementTask.main(
        cmd=[
            "--config",
            str(config),
            "--ssl",
            tiny_ssl,
            *data,
            "--output_dir",
            str(tmp_path / "exp"),
        ]
    )
    assert (tmp_path / "exp" / "valid.loss.best.pth").exists()


def test_criteria_are_told_of_lengths(tmp_path, tiny_ssl):
    args = EnhancementTask.get_parser().parse_args(
        ["--config", str(write_config(tmp_path)), "--ssl", tiny_ssl, "--output_dir", str(tmp_path)]
    )
    model = EnhancementTask.build_model(args)
    lengths = torch.tensor([4000, 3000])
    torch.manual_seed(0)
    mix, ref = torch.randn(2, 2, 4000)
    model(speech_mix=mix, speech_mix_lengths=lengths, speech_ref1=ref, utt_id=["a", "b"])
    criterion = model.loss_wrappers[0].criterion
    assert criterion.utt_ids == ["a", "b"]
    assert criterion.lengths is lengths


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"separator": "demux"}, "separator: unknown name 'demux'"),
        (
            {
                "criterions": [
                    {"name": "ssl_mze", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {}}
                ]
            },
            "criterions: name: unknown name 'ssl_mze'; one of .*ssl_mse",
        ),
        (
            {
                "criterions": [
                    {"name": "ssl_mse", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {}}
                ]
            },
            "criterion ssl_mse: no SSL model; give --ssl",
        ),
    ],
)
def test_bad_configuration(tmp_path, changes, message):
    args = EnhancementTask.get_parser().parse_args(["--output_dir", str(tmp_path)])
    vars(args).update(yaml.safe_load(write_config(tmp_path, **changes).read_text()))
    with pytest.raises(InputError, match=message):
        EnhancementTask.build_model(args)


def test_bad_criterion_file(tmp_path):
    path = tmp_path / "criterion.yaml"
    path.write_text("name: ssl_mse")
    args = EnhancementTask.get_parser().parse_args(
        ["--output_dir", str(tmp_path), "--criterion_file", str(path)]
    )
    with pytest.raises(InputError, match="must be a list of criteria with name, conf, wrapper"):
        EnhancementTask.build_model(args)
