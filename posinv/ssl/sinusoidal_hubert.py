"""A HuBERT in which the amount of position is a choice, for experiments on position.

HuBERT's features learn where a frame is from the zeros that its positional convolution sees beyond
the ends of an utterance. Here, that convolution can be left out, and sinusoidal embeddings of the
frame's index can be added at the same place (Vaswani et al., *Attention Is All You Need*, 2017,
section 3.5), as strong as one likes.
"""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, HubertConfig, HubertModel


@strict
class SinusoidalHubertConfig(HubertConfig):
    """HuBERT's configuration and these.

    Attributes:
        sinusoid_scale: amplitude of the sinusoids that are added to the transformer's input, as a
            multiple of the frame's root mean square; 0: none.
        positional_convolution: have HuBERT's positional convolution.
    """

    model_type = "sinusoidal-hubert"

    sinusoid_scale: float | int = 0.0
    positional_convolution: bool = True


class PositionalEmbedding(nn.Module):
    """What is added to the transformer's input, of the same shape: convolution and sinusoids.

    Args:
        convolution: HuBERT's positional convolution, or None.
        scale: ``sinusoid_scale``.
    """

    def __init__(self, convolution: nn.Module | None, scale: float) -> None:
        super().__init__()
        self.convolution = convolution
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding (B, F, D) of (B, F, D), which must be zero past the lengths."""
        out = torch.zeros_like(x) if self.convolution is None else self.convolution(x)
        if self.scale:
            # Relative to the frame: training can't make them small by making its features large.
            size = x.detach().square().mean(2, keepdim=True).sqrt()
            out = out + self.scale * size * sinusoids(x.size(1), x.size(2)).to(x)
        return out


def sinusoids(frames: int, width: int) -> Tensor:
    """Return the embeddings (frames, width) of the indices 0 to frames - 1, sines before cosines.

    Wavelengths range from 2 pi to 10,000 x 2 pi frames. ``width`` must be even.
    """
    rates = torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    angles = torch.arange(frames)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SinusoidalHubertModel(HubertModel):
    """A HuBERT whose ``encoder.pos_conv_embed`` is a :class:`PositionalEmbedding`."""

    config_class = SinusoidalHubertConfig

    def __init__(self, config: SinusoidalHubertConfig) -> None:
        super().__init__(config)
        encoder: Any = self.encoder
        convolution = encoder.pos_conv_embed if config.positional_convolution else None
        encoder.pos_conv_embed = PositionalEmbedding(convolution, config.sinusoid_scale)


AutoConfig.register("sinusoidal-hubert", SinusoidalHubertConfig)
AutoModel.register(SinusoidalHubertConfig, SinusoidalHubertModel)
