"""Tiny models of every family, and batches for them."""

import pytest
import torch
from tiny_ssl import TINY_SSL
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    SeamlessM4TFeatureExtractor,
    SEWConfig,
    UniSpeechSatConfig,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from posinv.ssl.sinusoidal_hubert import SinusoidalHubertConfig

TINY = {**TINY_SSL, "num_hidden_layers": 3}
GROUP = {"feat_extract_norm": "group"}
LAYER = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
CONVOLUTIONS = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
BERT = {key: value for key, value in TINY.items() if "conv" not in key}
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
    "unispeech-sat-base": UniSpeechSatConfig(**TINY, **GROUP),
    "unispeech-sat-large": UniSpeechSatConfig(**TINY, **LAYER),
    "sew": SEWConfig(**TINY, **CONVOLUTIONS, **GROUP),
    "sew-odd": SEWConfig(
        **{**TINY, "num_conv_pos_embeddings": 15, "conv_dim": [32] * 7},
        **CONVOLUTIONS,
        squeeze_factor=3,
        feat_extract_norm="layer",
    ),
    "conformer-relative": Wav2Vec2ConformerConfig(**TINY, **GROUP),
    "conformer-rotary-large": Wav2Vec2ConformerConfig(
        **TINY, feat_extract_norm="layer", conv_bias=True, position_embeddings_type="rotary"
    ),
    "conformer-none": Wav2Vec2ConformerConfig(**TINY, position_embeddings_type=None),
    "sinusoidal": SinusoidalHubertConfig(**TINY, **GROUP, sinusoid_scale=0.7),
    "sinusoidal-alone": SinusoidalHubertConfig(
        **TINY, **LAYER, sinusoid_scale=2.0, positional_convolution=False
    ),
    "w2v-bert": Wav2Vec2BertConfig(**BERT),
    "w2v-bert-relative": Wav2Vec2BertConfig(**BERT, position_embeddings_type="relative"),
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
        extractor = SeamlessM4TFeatureExtractor if "w2v-bert" in name else Wav2Vec2FeatureExtractor
        extractor(do_normalize="large" in name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def batch():
    """A function of lengths that makes waves, whose padding is noise, and the lengths' tensor."""

    def make(lengths, scale=1.0):
        waves = scale * torch.randn(len(lengths), max(lengths) + 37)
        return waves, torch.tensor(lengths)

    return make
