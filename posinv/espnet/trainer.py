"""ESPnet's trainer, made reproducible: validation, accumulated gradients, and what it refuses."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.trainer import Trainer, TrainerOptions

from posinv.data.files import atomic_file
from posinv.errors import InputError

MATMUL_PRECISIONS = ("highest", "high", "medium")


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
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--float32_matmul_precision`` to ESPnet's options."""
        parser.add_argument(
            "--float32_matmul_precision",
            choices=MATMUL_PRECISIONS,
            default="highest",
            help="As torch.set_float32_matmul_precision: high is TF32 on GPUs; medium is that, and "
            "oneDNN on CPUs: bfloat16 where there are matrix units for it (Intel AMX), else "
            "float32, faster than the default on AMD. The distances that soft-DTW aligns by are "
            "float32 always.",
        )

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> TrainerOptions:
        """Set the products' precision; return what ``train`` and ``validate`` use of the options.

        Raises:
            InputError: several GPUs in one process, where batches lose track of their
                utterances; mixed precision on the CPU, where ESPnet would not say that it is
                off; or two options for the products' precision.
        """
        if args.ngpu > 1:
            raise InputError(
                f"--ngpu {args.ngpu}: several GPUs take a process each: give "
                "--multiprocessing_distributed true"
            )
        if args.use_amp and args.ngpu == 0:
            raise InputError("--use_amp true: mixed precision needs a GPU: give --ngpu, or false")
        if args.float32_matmul_precision not in MATMUL_PRECISIONS:  # in YAML; argparse sees options
            raise InputError(
                f"float32_matmul_precision: must be one of {', '.join(MATMUL_PRECISIONS)}: "
                f"{args.float32_matmul_precision!r}"
            )
        if not args.use_tf32:
            torch.set_float32_matmul_precision(args.float32_matmul_precision)
        elif args.float32_matmul_precision != "highest":
            raise InputError("--use_tf32 and --float32_matmul_precision: give one of the two")
        return super().build_options(args)

    @classmethod
    def run(cls, model: torch.nn.Module, **parts) -> None:
        """Train; checkpoints are written atomically, whenever the run is killed."""
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
    """Make ESPnet's ``torch.save(object, path)`` atomic."""
    save = torch.save

    def save_whole(state: object, path: Path) -> None:
        # torch writes the name of a path into the file, but not that of a stream
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            save(state, file)

    torch.save = save_whole
    try:
        yield
    finally:
        torch.save = save
