"""Tiny models of every family, and batches for them."""

import pytest
import torch
from tiny_ssl import TINY_SSL
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

TINY = {**TINY_SSL, "num_hidden_layers": 3}
GROUP = {"feat_extract_norm": "group"}
LAYER = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
FAMILIES = {
    "hubert-base": HubertConfig(**TINY, **GROUP),
    "hubert-large": HubertConfig(**TINY, **LAYER),
    "hubert-batchnorm": HubertConfig(**TINY, **GROUP, conv_pos_batch_norm=True),
    "wavlm-base": WavLMConfig(**TINY, **GROUP),
    "wavlm-large": WavLMConfig(**TINY, **LAYER),
    "wav2vec2-base": Wav2Vec2Config(**TINY, **GROUP),
    "wav2vec2-large": Wav2Vec2Config(**TINY, **LAYER),
    "data2vec": Data2VecAudioConfig(
        **{**TINY, "num_conv_pos_embeddings": 3}, conv_pos_kernel_size=7
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """The name of each family in turn."""
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder for each family. No weight has its initial value, so that every bias counts."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    for name, config in FAMILIES.items():
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        model.save_pretrained(root / name)
        Wav2Vec2FeatureExtractor(do_normalize="large" in name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def batch():
    """A function of lengths that makes waves, whose padding is noise, and the lengths' tensor."""

    def make(lengths, scale=1.0):
        waves = scale * torch.randn(len(lengths), max(lengths) + 37)
        return waves, torch.tensor(lengths)

    return make
