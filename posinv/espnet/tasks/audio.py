"""What posinv's own tasks share: data that reach the model as they are read."""

import argparse
from collections.abc import Callable, Collection

import numpy as np
import torch
from espnet2.tasks.abs_task import AbsTask
from espnet2.train.collate_fn import CommonCollateFn

from posinv.espnet.trainer import SeededTrainer


class _CollateFn(CommonCollateFn):
    """ESPnet's, with the lengths of the audio as a list.

    Of a tensor, which goes to the GPU, they could only be had by waiting for all work there.
    """

    def __call__(
        self, data: Collection[tuple[str, dict[str, np.ndarray]]]
    ) -> tuple[list[str], dict[str, torch.Tensor | list[int]]]:
        names, batch = super().__call__(data)
        return names, {**batch, "speech_lengths": batch["speech_lengths"].tolist()}


class AudioTask(AbsTask):
    """A task of one optimiser over ``speech`` (``sound``), without preprocessing."""

    num_optimizers = 1
    trainer = SeededTrainer

    @classmethod
    def build_collate_fn(
        cls, args: argparse.Namespace, train: bool
    ) -> Callable[
        [Collection[tuple[str, dict[str, np.ndarray]]]],
        tuple[list[str], dict[str, torch.Tensor | list[int]]],
    ]:
        """Return ESPnet's collate function: zeros after audio, -1 after labels."""
        return _CollateFn(float_pad_value=0.0, int_pad_value=-1)

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool) -> None:
        """Return None: data are used as they are."""
        return None

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the data that training needs."""
        return ("speech",)

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return no further data."""
        return ()
