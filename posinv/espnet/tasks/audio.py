"""Base class of posinv's own tasks, which read audio without preprocessing."""

import argparse
from collections.abc import Callable, Collection

import numpy as np
import torch
from espnet2.train.collate_fn import CommonCollateFn
from espnet2.utils.get_default_kwargs import get_default_kwargs
from espnet2.utils.nested_dict_action import NestedDictAction

from posinv.espnet.tasks.checked import CheckedTask
from posinv.espnet.trainer import SeededTrainer

Utterances = Collection[tuple[str, dict[str, np.ndarray]]]
Batch = tuple[list[str], dict[str, torch.Tensor | list[int]]]


class _CollateFn(CommonCollateFn):
    """ESPnet's collate function, with the audio lengths as a list of integers.

    ESPnet moves every tensor of a batch to the GPU. To read the lengths back from there, the CPU
    would have to wait until the GPU has done all its work.
    """

    def __call__(self, data: Utterances) -> Batch:
        names, batch = super().__call__(data)
        return names, {**batch, "speech_lengths": batch["speech_lengths"].tolist()}


class AudioTask(CheckedTask):
    """A task with one optimiser over the data ``speech`` (``sound``), without preprocessing.

    Attributes:
        model_class: the model that is trained; ``--model_conf`` has its keyword arguments.
    """

    model_class: type[torch.nn.Module]
    num_optimizers = 1
    trainer = SeededTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--model_conf``."""
        group = parser.add_argument_group(description="Task related")
        group.add_argument(
            "--model_conf",
            action=NestedDictAction,
            default=get_default_kwargs(cls.model_class),
            help=f"The keyword arguments for {cls.model_class.__name__}",
        )

    @classmethod
    def build_collate_fn(
        cls, args: argparse.Namespace, train: bool
    ) -> Callable[[Utterances], Batch]:
        """Return a collate function that pads audio with 0 and labels with -1."""
        return _CollateFn(float_pad_value=0.0, int_pad_value=-1)

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool) -> None:
        """Return None: data are used as they are."""
        return None

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the names of the data that training needs."""
        return ("speech",)

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return no further names."""
        return ()
