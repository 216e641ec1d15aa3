"""posinv's models with the interface of ESPnet's trainer."""

from typing import Any

from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor, nn

from posinv.models.masked_prediction import MaskedPredictionModel
from posinv.models.ssft import SSFTModel


class _Gatherable(nn.Module):
    """Mixin: the model's outputs as tensors of one dimension, which ESPnet needs to gather them."""

    def forward(self, *args: Any, **batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss, statistics and weight of a batch, which ESPnet gives by name."""
        # ESPnet's chunk iterator gives no lengths: its chunks are whole.
        speech = batch["speech"]
        batch.setdefault("speech_lengths", [speech.size(1)] * len(speech))
        output = super().forward(*args, **batch)
        return force_gatherable(output, output[0].device)

    def collect_feats(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return nothing: the models need no statistics of their input."""
        return {}


class ESPnetSSFTModel(_Gatherable, SSFTModel, AbsESPnetModel):
    """:class:`~posinv.models.ssft.SSFTModel` for ESPnet's trainer."""


class ESPnetMaskedPredictionModel(_Gatherable, MaskedPredictionModel, AbsESPnetModel):
    """:class:`~posinv.models.masked_prediction.MaskedPredictionModel` for ESPnet's trainer."""
