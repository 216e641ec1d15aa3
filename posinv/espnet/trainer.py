"""ESPnet's trainer, made reproducible."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.trainer import Trainer, TrainerOptions

from posinv.data.checkpoint import write_checkpoint
from posinv.errors import InputError

MATMUL_PRECISIONS = ("highest", "high", "medium")


class SeededTrainer(Trainer):
    """ESPnet's trainer for models that make random draws in training and validation.

    ESPnet sets the random seed of every epoch to ``seed + epoch``, in every process. The draws of
    an utterance depend on this seed and on its utterance id. They are therefore the same in a run
    that was resumed, and in any number of processes. This class adds three things:

    - The random seed of validation is ``seed`` in every epoch, so that the validation losses of
      different epochs can be compared.
    - If the number of mini-batches in an epoch is no multiple of ``accum_grad``, the gradients of
      the last ones are dropped. ESPnet would add them to the next epoch's, but does not save them
      in the checkpoint, so a resumed run would differ.
    - Checkpoints are written atomically.
    """

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--float32_matmul_precision`` to ESPnet's options."""
        parser.add_argument(
            "--float32_matmul_precision",
            choices=MATMUL_PRECISIONS,
            default="highest",
            help="Precision of float32 matrix products, see torch.set_float32_matmul_precision. "
            "high: TF32 on GPUs. medium: TF32 on GPUs, oneDNN on CPUs (bfloat16 on CPUs that have "
            "matrix units for it, as Intel AMX; float32 on others, on AMD faster than highest). "
            "Soft-DTW's distances are never computed in less than float32.",
        )

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> TrainerOptions:
        """Set the precision of matrix products, and return ESPnet's trainer options.

        Raises:
            InputError: several GPUs in one process, since ESPnet then splits a batch but not its
                utterance ids; mixed precision on the CPU, which ESPnet would ignore silently; an
                unknown precision, or two options for it.
        """
        if args.ngpu > 1:
            raise InputError(
                f"--ngpu {args.ngpu}: several GPUs need one process each: give "
                "--multiprocessing_distributed true"
            )
        if args.use_amp and args.ngpu == 0:
            raise InputError("--use_amp true: mixed precision needs a GPU: give --ngpu, or false")
        if args.float32_matmul_precision not in MATMUL_PRECISIONS:  # argparse doesn't check YAML
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
    def run(cls, model: torch.nn.Module, **parts: Any) -> None:
        """Train, with checkpoints that are written atomically."""
        model.register_forward_hook(_copy_loss)
        with atomic_save():
            super().run(model=model, **parts)

    @classmethod
    def train_one_epoch(cls, optimizers: Sequence[torch.optim.Optimizer], **kwargs: Any) -> bool:
        """Drop the gradients that the last epoch left, and run ESPnet's epoch."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        return super().train_one_epoch(optimizers=optimizers, **kwargs)

    @classmethod
    @torch.no_grad()
    def validate_one_epoch(cls, *, options: TrainerOptions, **kwargs: Any) -> None:
        """Set the random seed to ``options.seed``, and run ESPnet's validation."""
        set_all_random_seed(options.seed)
        super().validate_one_epoch(options=options, **kwargs)


def _copy_loss(_model: torch.nn.Module, _args: tuple, output: tuple) -> tuple:
    """Copy the loss: ESPnet divides it in place, and the statistics may hold the same tensor."""
    loss, stats, weight = output
    return loss.clone(), stats, weight


@contextmanager
def atomic_save() -> Iterator[None]:
    """Make ESPnet's ``torch.save(object, path)`` atomic; also inside another of these."""
    save = torch.save
    torch.save = write_checkpoint  # type: ignore[assignment]  # ESPnet gives it nothing else
    try:
        yield
    finally:
        torch.save = save
