"""Pretraining of a small HuBERT as an ESPnet task."""

import argparse

from espnet2.utils.get_default_kwargs import get_default_kwargs
from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import int_or_none

from posinv.espnet.models import ESPnetMaskedPredictionModel
from posinv.espnet.tasks.audio import AudioTask
from posinv.models.masked_prediction import MaskedPredictionModel


class PretrainTask(AudioTask):
    """Masked prediction: data ``speech`` (``sound``) and ``units`` (``text_int``)."""

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's options."""
        group = parser.add_argument_group(description="Task related")
        parser.get_default("required").append("num_units")
        group.add_argument(
            "--num_units", type=int_or_none, default=None, help="Number of k-means units"
        )
        group.add_argument(
            "--ssl_conf",
            action=NestedDictAction,
            default={},
            help="The model: what of transformers' HubertConfig differs from HuBERT-Base",
        )
        group.add_argument(
            "--model_conf",
            action=NestedDictAction,
            default=get_default_kwargs(MaskedPredictionModel),
            help="The keyword arguments for MaskedPredictionModel",
        )

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the data that training needs."""
        return ("speech", "units")

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetMaskedPredictionModel:
        """Build the model.

        Raises:
            InputError: A bad option in ``ssl_conf`` or ``model_conf``.
        """
        return ESPnetMaskedPredictionModel(args.ssl_conf, args.num_units, **args.model_conf)
