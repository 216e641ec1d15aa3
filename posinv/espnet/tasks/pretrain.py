"""Pretraining of a small HuBERT as an ESPnet task."""

import argparse

from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import int_or_none

from posinv.espnet.models import ESPnetMaskedPredictionModel
from posinv.espnet.tasks.audio import AudioTask
from posinv.models.masked_prediction import MaskedPredictionModel


class PretrainTask(AudioTask):
    """Masked prediction: data ``speech`` (``sound``) and ``units`` (``text_int``)."""

    model_class = MaskedPredictionModel

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's options."""
        super().add_task_arguments(parser)
        parser.get_default("required").append("num_units")
        parser.add_argument(
            "--num_units", type=int_or_none, default=None, help="Number of k-means units"
        )
        parser.add_argument(
            "--ssl_conf",
            action=NestedDictAction,
            default={},
            help="The options of transformers' HubertConfig that differ from HuBERT-Base",
        )

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the names of the data that training needs."""
        return ("speech", "units")

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetMaskedPredictionModel:
        """Build the model.

        Raises:
            InputError: a bad option in ``ssl_conf`` or ``model_conf``.
        """
        return ESPnetMaskedPredictionModel(args.ssl_conf, args.num_units, **args.model_conf)
