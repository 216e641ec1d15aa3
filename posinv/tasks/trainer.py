"""ESPnet's trainer, made reproducible: validation, accumulated gradients, and what it refuses."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.trainer import Trainer, TrainerOptions

from posinv.errors import InputError


class SeededTrainer(Trainer):
    """ESPnet's trainer for models that draw at random while they train and validate.

    ESPnet seeds every epoch with ``seed + epoch``, the same in every process, so draws keyed by
    utterance are those of an unbroken run in one process, however often a run is resumed and
    however many processes share its batches. Here validation is seeded with ``seed`` alone: its
    loss is a function of the model, and curves compare. And where ``accum_grad`` leaves
    mini-batches over at the end of an epoch, they are dropped: ESPnet hands their gradients to the
    next epoch, but to no checkpoint, so that a resumed run would differ.
    """

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> TrainerOptions:
        """Return what ``train`` and ``validate`` use of the options.

        Raises:
            InputError: several GPUs in one process, where batches lose track of their
                utterances; or mixed precision on the CPU, where ESPnet would not say that it is
                off.
        """
        if args.ngpu > 1:
            raise InputError(
                f"--ngpu {args.ngpu}: several GPUs take a process each: give "
                "--multiprocessing_distributed true"
            )
        if args.use_amp and args.ngpu == 0:
            raise InputError("--use_amp true: mixed precision needs a GPU: give --ngpu, or false")
        return super().build_options(args)

    @classmethod
    def run(cls, model: torch.nn.Module, **parts) -> None:
        """Train; a checkpoint is there whole or not at all, whenever the run is killed."""
        model.register_forward_hook(_separate_loss)
        with _saving_whole():
            super().run(model=model, **parts)

    @classmethod
    def train_one_epoch(cls, optimizers: Sequence[torch.optim.Optimizer], **kwargs) -> bool:
        """Run ESPnet's epoch, without gradients that the epoch before left over."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        return super().train_one_epoch(optimizers=optimizers, **kwargs)

    @classmethod
    @torch.no_grad()
    def validate_one_epoch(cls, model, iterator, reporter, options, distributed_option) -> None:
        """Run ESPnet's validation from the random state that ``options.seed`` gives."""
        set_all_random_seed(options.seed)
        super().validate_one_epoch(model, iterator, reporter, options, distributed_option)


def _separate_loss(_model: torch.nn.Module, _args: tuple, output: tuple) -> tuple:
    """Part the loss from that among the statistics, or ESPnet divides both by ``accum_grad``."""
    loss, stats, weight = output
    return loss.clone(), stats, weight


@contextmanager
def _saving_whole() -> Iterator[None]:
    """Make ESPnet's ``torch.save(object, path)`` write under another name first."""
    save = torch.save

    def save_whole(state: object, path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        save(state, partial)
        partial.replace(path)

    torch.save = save_whole
    try:
        yield
    finally:
        torch.save = save
