"""ESPnet's trainer, made reproducible."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.trainer import Trainer, TrainerOptions

from posinv.data.checkpoint import write_checkpoint
from posinv.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Batch = tuple[list[str], dict[str, Any]]
MATMUL_PRECISIONS = ("highest", "high", "medium")


class SeededTrainer(Trainer):
    """ESPnet's trainer for models that make random draws in training and validation.

    ESPnet sets the random seed of every epoch to ``seed + epoch``, in every process. The draws of
    an utterance depend on this seed and on its utterance id. They are therefore the same in a run
    that was resumed, and in any number of processes. This class adds four things:

    - The random seed of validation is ``seed`` in every epoch, so that the validation losses of
      different epochs can be compared.
    - If the number of mini-batches in an epoch is no multiple of ``accum_grad``, the gradients of
      the last ones are dropped. ESPnet would add them to the next epoch's, but does not save them
      in the checkpoint, so a resumed run would differ.
    - Checkpoints are written atomically.
    - With ``use_tensorboard``, TensorBoard also gets pictures and audio at each validation, see
      :func:`~posinv.espnet.tensorboard.show_validation`.
    """

    _writer: "SummaryWriter | None" = None
    _updates = 0

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
        with _atomic_save():
            super().run(model=model, **parts)

    @classmethod
    def train_one_epoch(cls, optimizers: Sequence[torch.optim.Optimizer], **kwargs: Any) -> bool:
        """Drop the gradients that the last epoch left, and run ESPnet's epoch."""
        # ESPnet gives it to the training only, and to one process only.
        cls._writer = kwargs["summary_writer"]
        for optimizer in optimizers:
            optimizer.zero_grad()
        failed = super().train_one_epoch(optimizers=optimizers, **kwargs)
        cls._updates = kwargs["reporter"].get_total_count()
        return failed

    @classmethod
    @torch.no_grad()
    def validate_one_epoch(
        cls,
        *,
        model: torch.nn.Module,
        iterator: Iterable[Batch],
        options: TrainerOptions,
        **kwargs: Any,
    ) -> None:
        """Set the random seed to ``options.seed``, run ESPnet's validation, and show some of it."""
        set_all_random_seed(options.seed)
        first: list[Batch] = []
        super().validate_one_epoch(
            model=model,
            iterator=_keep_first(iterator, first),
            options=options,
            **kwargs,
        )
        if cls._writer is not None and first:
            from posinv.espnet.tensorboard import show_validation  # imports matplotlib, 1 s

            show_validation(model, *first[0], cls._writer, cls._updates)


def _keep_first(batches: Iterable[Batch], first: list[Batch]) -> Iterator[Batch]:
    for names, batch in batches:
        if not first:
            first.append((names, dict(batch)))  # ESPnet changes it
        yield names, batch


def _copy_loss(_model: torch.nn.Module, _args: tuple, output: tuple) -> tuple:
    """Copy the loss: ESPnet divides it in place, and the statistics may hold the same tensor."""
    loss, stats, weight = output
    return loss.clone(), stats, weight


@contextmanager
def _atomic_save() -> Iterator[None]:
    """Make ESPnet's ``torch.save(object, path)`` atomic."""
    save = torch.save
    torch.save = write_checkpoint  # type: ignore[assignment]  # ESPnet gives it nothing else
    try:
        yield
    finally:
        torch.save = save
