import json
import logging

import pytest
import torch
from tiny_ssl import TINY_SSL
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoFeatureExtractor, BertConfig, Wav2Vec2Config

from posinv.errors import InputError
from posinv.ssl.load import check_layer, load_config
from posinv.ssl.upstream import SSLUpstream

pytestmark = pytest.mark.usefixtures("seeded")


def test_frame_lengths_match_transformers(folders):
    ssl = SSLUpstream(folders / "hubert-base")
    lengths = torch.arange(400, 3000)
    expected = ssl.model._get_feat_extract_output_lengths(lengths)
    assert torch.equal(ssl.frame_lengths(lengths), expected)
    assert ssl.frame_lengths(torch.tensor([0, 1, 399])).tolist() == [0, 0, 0]


def test_normalisation_is_read_or_given(folders, tmp_path, caplog):
    assert SSLUpstream(folders / "hubert-large").normalize
    assert not SSLUpstream(folders / "hubert-base").normalize
    assert SSLUpstream(folders / "hubert-base", normalize=True).normalize
    assert not SSLUpstream(folders / "hubert-large", normalize=False).normalize
    load_config(folders / "hubert-large").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        assert not SSLUpstream(tmp_path, random_init=True).normalize
    assert "no preprocessor_config.json" in caplog.text


def test_trainable_patterns(folders, caplog, batch):
    with caplog.at_level(logging.INFO):
        ssl = SSLUpstream(folders / "hubert-base", trainable=["encoder.layers.2.*"])
    names = {name for name, p in ssl.model.named_parameters() if p.requires_grad}
    assert names == {n for n in ssl.model.state_dict() if n.startswith("encoder.layers.2.")}
    assert f"{len(names)} of {len(list(ssl.parameters()))} parameter tensors" in caplog.text
    ssl.train()(*batch([4000]))[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in ssl.parameters())
    with pytest.raises(InputError, match=r"'encoder\.layer\.1\.\*' matches no.*encoder\.layers"):
        SSLUpstream(folders / "hubert-base", trainable=["encoder.layer.1.*"])


def test_random_init_draws_from_torchs_generator(folders, tmp_path):
    load_config(folders / "wavlm-base").save_pretrained(tmp_path)
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(SSLUpstream(tmp_path, random_init=True).model.encoder.layers[0].state_dict())
    key = "feed_forward.intermediate_dense.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_save_pretrained_round_trip(folders, tmp_path, batch):
    ssl = SSLUpstream(folders / "hubert-large")
    ssl.save_pretrained(tmp_path / "a folder")
    assert json.loads((tmp_path / "a folder/config.json").read_text())["layerdrop"] == 0.1
    again = SSLUpstream(tmp_path / "a folder")
    waves, lengths = batch([4000, 5000])
    torch.testing.assert_close(again(waves, lengths), ssl(waves, lengths), rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["a folder"]
    with pytest.raises(InputError, match="exists already"):
        ssl.save_pretrained(tmp_path / "a folder")


def test_check_layer(folders):
    config = load_config(folders / "hubert-base")
    assert [check_layer(config, i) for i in (None, -1, 0, 2, 3)] == [3, 3, 0, 2, 3]
    assert SSLUpstream(folders / "hubert-base").check_layer(-1) == 3
    for layer in (4, -2):
        with pytest.raises(InputError, match=rf"layer {layer} is out of range.*0 to 3"):
            check_layer(config, layer)


def test_models_that_cannot_be_loaded(folders, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="missing: no such folder"):
        SSLUpstream(tmp_path / "missing")
    with pytest.raises(InputError, match="neither a local folder"):
        SSLUpstream(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'bert' is not supported"):
        load_config(tmp_path)
    load_config(folders / "hubert-base").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="weights cannot be loaded"):
        SSLUpstream(tmp_path)
    weights = folders / "hubert-base/model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    config = load_config(folders / "hubert-base")
    config.num_hidden_layers = 4
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"weights lack \d+ .*encoder\.layers\.3"):
        SSLUpstream(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no-such-model-here: neither") as caught:
        load_config("no-such-model-here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["{}/hubert_base_ls960.pt", "WavLM-Base.pt", "{}/weights"])
def test_a_fairseq_checkpoint_is_told_of_the_converter(tmp_path, name):
    (tmp_path / "hubert_base_ls960.pt").write_bytes(b"PK")
    (tmp_path / "weights").write_bytes(b"PK")
    name = name.format(tmp_path)
    with pytest.raises(InputError) as caught:
        SSLUpstream(name)
    message = str(caught.value)
    assert message.startswith(f"SSL model {name}: a file") and "\n" not in message
    assert "convert_hubert_original_pytorch_checkpoint_to_pytorch.py" in message
    assert "facebook/hubert-base-ls960" in message and "microsoft/wavlm-base" in message


@pytest.mark.parametrize("name", ["w2v-bert", "sew", "conformer-relative"])
def test_save_pretrained_for_transformers(folders, tmp_path, batch, name):
    SSLUpstream(folders / name).save_pretrained(tmp_path / name)
    saved = AutoFeatureExtractor.from_pretrained(tmp_path / name)
    assert type(saved) is type(AutoFeatureExtractor.from_pretrained(folders / name))
    waves, lengths = batch([4000, 5000])
    found, expected = (SSLUpstream(top / name)(waves, lengths) for top in (tmp_path, folders))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_trained_gets_a_gradient(folders, batch, family):
    ssl = SSLUpstream(folders / family, trainable=["*"]).train()
    ssl(*batch([4000, 5000]))[0].square().sum().backward()
    assert not [n for n, p in ssl.named_parameters() if p.requires_grad and p.grad is None]
    dropouts = [m for m in ssl.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and all(dropout.training for dropout in dropouts)


def test_an_adapter_is_not_trained(tmp_path, batch):
    Wav2Vec2Config(**TINY_SSL, add_adapter=True).save_pretrained(tmp_path)
    ssl = SSLUpstream(tmp_path, random_init=True, trainable=["*"]).train()
    ssl(*batch([4000, 5000]))[0].square().sum().backward()
    assert not [n for n, p in ssl.named_parameters() if p.requires_grad and p.grad is None]
    with pytest.raises(InputError, match=r"'adapter\.\*' matches no parameter that"):
        SSLUpstream(tmp_path, random_init=True, trainable=["adapter.*"])


@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_all_is_trained_under_distributed_data_parallel(folders, batch, tmp_path, name):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        ssl = DistributedDataParallel(SSLUpstream(folders / name, trainable=["*"]).train())
        for _ in range(2):  # the second forward fails if a parameter had no gradient
            ssl(*batch([4000, 5000]))[0].square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
