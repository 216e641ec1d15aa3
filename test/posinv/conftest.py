import pytest
import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor


@pytest.fixture(scope="session")
def tiny_ssl(tmp_path_factory):
    """A folder with a random HuBERT of 3 layers, 32 wide, group norm as in HuBERT-Base."""
    folder = tmp_path_factory.mktemp("tiny ssl")
    torch.manual_seed(5)
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="group",
    )
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return str(folder)
