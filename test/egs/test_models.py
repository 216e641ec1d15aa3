"""A recipe whole, at toy size, with models that posinv doesn't train itself."""

import json

import pytest
import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import Data2VecAudioConfig, Data2VecAudioModel


@pytest.fixture
def data2vec(tmp_path):
    """A data2vec-audio model of random weights, 32 wide."""
    torch.manual_seed(0)
    config = Data2VecAudioConfig(
        **{**TINY_SSL, "num_conv_pos_embeddings": 2}, conv_pos_kernel_size=7
    )
    Data2VecAudioModel(config).save_pretrained(tmp_path / "data2vec")
    return tmp_path / "data2vec"


@pytest.mark.full
def test_tfgridnet_through_data2vec(recipe, checkout, data2vec):
    small = {"n_layers": 1, "emb_dim": 4, "lstm_hidden_units": 4, "attn_approx_qk_dim": 130}
    path = checkout / "conf" / "small" / "enh" / "tfgridnet.yaml"
    model = yaml.safe_load(path.read_text())
    model["separator_conf"] |= small
    path.write_text(yaml.safe_dump(model))
    mini = recipe("mini/enh1")
    done = mini.run(
        *("--local_data_opts", "--minutes 0.5 --dev_minutes 0.1 --test_minutes 0.1"),
        *("--ssl_model", data2vec, "--enh_model", "conf/enh/tfgridnet.yaml"),
        *("--criteria", "ssl_mse", "--test_conditions", "clean seen"),
        *("--token_sets", "train dev test"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tuned = mini.dir / "exp/seed1/ssl_mse"
    config = yaml.safe_load((tuned / "config.yaml").read_text())
    assert config["separator"] == "tfgridnet"
    assert config["separator_conf"] == model["separator_conf"]
    assert (tuned / "enhanced/scores.json").exists()
    for task in ("pr", "asr"):
        scores = json.loads((tuned / f"superb/{task}/best/decode/scores.json").read_text())
        assert scores.keys() == {"test_clean", "test_seen"}
