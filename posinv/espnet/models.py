"""posinv's models as ESPnet's trainer takes them."""

from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from posinv.models.masked_prediction import MaskedPredictionModel
from posinv.models.ssft import SSFTModel


class _Gatherable:
    """Loss, statistics and weight in the form that ESPnet gathers over processes."""

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss, statistics and weight of a batch."""
        output = super().forward(**batch)
        return force_gatherable(output, output[0].device)

    def collect_feats(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return nothing: the input has no statistics to gather."""
        return {}


class ESPnetSSFTModel(_Gatherable, SSFTModel, AbsESPnetModel):
    """:class:`~posinv.models.ssft.SSFTModel` in ESPnet."""


class ESPnetMaskedPredictionModel(_Gatherable, MaskedPredictionModel, AbsESPnetModel):
    """:class:`~posinv.models.masked_prediction.MaskedPredictionModel` in ESPnet."""
