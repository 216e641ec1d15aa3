"""Joint enhancement and recognition: the recogniser's gradient through the front end ssl."""

import pytest
import torch
import yaml

from posinv.espnet.criteria import SSLCriterion
from posinv.espnet.tasks.enh_s2t import EnhS2TTask

TOKENS = ["<blank>", "<unk>", "a", "b", "<sos/eos>"]
SSL_MSE = {"name": "ssl_mse", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_utterances):
    """Options for 4 short noisy and clean utterances with text."""
    folder = tmp_path_factory.mktemp("data")
    write_utterances(folder, 4)
    (folder / "text").write_text("".join(f"utt{i} {'ab'[i % 2]}\n" for i in range(4)))
    names = {"wav.scp": "speech,sound", "spk1.scp": "speech_ref1,sound", "text": "text_spk1,text"}
    options = []
    for part in ("train", "valid"):
        for file, name in names.items():
            options += [f"--{part}_data_path_and_name_and_type", f"{folder / file},{name}"]
        options += [f"--{part}_shape_file", str(folder / "shape")]
    return options


def options(folder, tiny_ssl, **changes):
    (folder / "train.yaml").write_text(
        yaml.safe_dump(
            {
                "enh_encoder": "same",
                "enh_separator": "demucs",
                "enh_separator_conf": {"hidden": 4, "depth": 2, "resample": 1},
                "enh_decoder": "same",
                "frontend": "ssl",
                "frontend_conf": {"ssl": tiny_ssl, "cache_gb": 1.0},
                "normalize": None,
                "asr_encoder": "blstm",
                "asr_encoder_conf": {"hidden_size": 32, "num_layers": 1, "dropout": 0.0},
                "ctc_conf": {"dropout_rate": 0.0},
                "asr_model_conf": {"ctc_weight": 1.0},
                "token_list": TOKENS,
                "use_preprocessor": True,
                "token_type": "char",
                "text_name": ["text_spk1"],
                "optim": "adam",
                "optim_conf": {"lr": 0.003},
                "max_epoch": 8,
                "batch_type": "sorted",
                "batch_size": 4,
                "num_workers": 0,
                "best_model_criterion": [["valid", "loss", "min"]],
                "use_matplotlib": False,
                "use_tensorboard": False,
                **changes,
            }
        )
    )
    return ["--config", str(folder / "train.yaml"), "--output_dir", str(folder / "exp")]


def batch():
    torch.manual_seed(0)
    speech, clean = torch.randn(2, 2, 4000)
    return {
        "speech": speech,
        "speech_lengths": torch.tensor([4000, 3000]),
        "speech_ref1": clean,
        "text_spk1": torch.tensor([[2, 3], [3, -1]]),
        "text_spk1_lengths": torch.tensor([2, 1]),
        "utt_id": ["one", "two"],
    }


def test_the_recognisers_loss_alone_trains_the_enhancement_model(tmp_path, data, tiny_ssl):
    """Recogniser and SSL model are frozen, and there is no enhancement loss."""
    command = options(tmp_path, tiny_ssl, model_conf={"calc_enh_loss": False})
    EnhS2TTask.main(cmd=[*command, *data, "--freeze_param", "s2t_model"])
    state = torch.load(tmp_path / "exp" / "checkpoint.pth", weights_only=False)
    losses = [epoch["train"]["loss"] for epoch in state["reporter"]["stats"].values()]
    assert len(losses) == 8
    # 13.51 to 12.29 in one run; without a gradient it would stay as it is: there is no dropout.
    assert losses[-1] < 0.95 * losses[0]
    assert not any("upstream" in name for name in state["model"])


def test_every_parameter_of_the_enhancement_model_gets_a_gradient(tmp_path, tiny_ssl):
    command = options(tmp_path, tiny_ssl, model_conf={"calc_enh_loss": False})
    model = EnhS2TTask.build_model(EnhS2TTask.get_parser().parse_args(command))
    loss, _, _ = model.train()(**batch())
    loss.backward()
    assert all(p.grad.any() for p in model.enh_model.parameters())
    frozen = model.s2t_model.frontend.upstream.module
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training


def test_criteria_are_told_of_lengths(tmp_path, tiny_ssl, monkeypatch):
    seen = []
    features = SSLCriterion.features
    monkeypatch.setattr(
        SSLCriterion,
        "features",
        lambda self, waves, lengths: seen.append(lengths) or features(self, waves, lengths),
    )
    command = options(tmp_path, tiny_ssl, enh_criterions=[SSL_MSE])
    args = EnhS2TTask.get_parser().parse_args([*command, "--ssl", tiny_ssl])
    model = EnhS2TTask.build_model(args)
    assert args.enh_criterions[0]["conf"]["ssl"] == tiny_ssl  # and so in config.yaml
    loss, _, _ = model(**batch())
    assert seen and all(lengths.tolist() == [4000, 3000] for lengths in seen)
    assert model.enh_model.loss_wrappers[0].criterion.utt_ids == ["one", "two"]
    assert loss.isfinite()
