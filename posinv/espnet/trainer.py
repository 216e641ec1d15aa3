"""ESPnet's trainer, made reproducible."""

import argparse
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.trainer import Trainer, TrainerOptions

from posinv.data.checkpoint import read_checkpoint, write_checkpoint
from posinv.data.files import remove_leftovers, write_atomic
from posinv.errors import InputError
from posinv.models.nonfinite import first_nonfinite

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SHOWN = 8  # utterances in a message
Batch = tuple[list[str], dict[str, Any]]
CHECKPOINT, NEXT_CHECKPOINT = "checkpoint.pth", "checkpoint.next.pth"
MATMUL_PRECISIONS = ("highest", "high", "medium")


class SeededTrainer(Trainer):
    """ESPnet's trainer for models that make random draws in training and validation.

    ESPnet sets the random seed of every epoch to ``seed + epoch``, in every process. The draws of
    an utterance depend on this seed and on its utterance id. They are therefore the same in a run
    that was resumed, and in any number of processes. This class adds these:

    - The random seed of validation is ``seed`` in every epoch, so that the validation losses of
      different epochs can be compared.
    - If the number of mini-batches in an epoch is no multiple of ``accum_grad``, the gradients of
      the last ones are dropped. ESPnet would add them to the next epoch's, but does not save them
      in the checkpoint, so a resumed run would differ.
    - Checkpoints are written atomically. The file that a training goes on from takes its place when
      all else of its epoch is there; ESPnet writes it first, and would go on without the epoch's
      weights and links if it were killed after that.
    - With ``use_tensorboard``, TensorBoard also gets pictures and audio at each validation, see
      :func:`~posinv.espnet.tensorboard.show_validation`.

    ESPnet leaves out each update whose gradient is not finite, for ever. Here, more than
    ``--nonfinite_updates`` in a row end the training.
    """

    nonfinite_updates: int  # ESPnet makes no instance of its trainer
    watch: "NonFiniteWatch"
    _writer: "SummaryWriter | None" = None
    _updates = 0
    _writes = True  # not so in the further processes of a distributed training

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--float32_matmul_precision`` and ``--nonfinite_updates`` to ESPnet's options."""
        parser.add_argument(
            "--nonfinite_updates",
            type=int,
            default=10,
            help="How many updates in a row may have a loss or gradient that is not finite. One "
            "more ends the training, with the utterances' names and the module that the values "
            "come from. With --use_amp, some of the first updates are such until the loss is "
            "scaled right.",
        )
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
                unknown precision, or two options for it; --nonfinite_updates below 0.
        """
        if not isinstance(args.nonfinite_updates, int) or args.nonfinite_updates < 0:
            raise InputError(
                f"--nonfinite_updates {args.nonfinite_updates}: a whole number, at least 0"
            )
        cls.nonfinite_updates = args.nonfinite_updates
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
    def run(
        cls,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        trainer_options: TrainerOptions,
        **parts: Any,
    ) -> None:
        """Train, with checkpoints that are written atomically.

        Raises:
            InputError: more than ``--nonfinite_updates`` updates in a row without a finite
                gradient. What was in their batches is in ``nonfinite.txt`` in the output directory.
        """
        model.register_forward_hook(_copy_loss)
        cls.watch = NonFiniteWatch(
            model,
            optimizers,
            cls.nonfinite_updates,
            trainer_options.accum_grad,
            Path(trainer_options.output_dir) / "nonfinite.txt",
        )
        output_dir = Path(trainer_options.output_dir)
        cls._writes = not parts["distributed_option"].dist_rank
        if cls._writes and output_dir.exists():
            remove_leftovers(output_dir)
            (output_dir / NEXT_CHECKPOINT).unlink(missing_ok=True)
        with atomic_save():
            super().run(
                model=model, optimizers=optimizers, trainer_options=trainer_options, **parts
            )
        cls._end_epoch(output_dir)

    @staticmethod
    def resume(checkpoint: str | Path, *args: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint, which must hold tensors and plain containers alone."""
        read_checkpoint(checkpoint)
        Trainer.resume(checkpoint, *args, **kwargs)

    @classmethod
    def train_one_epoch(cls, optimizers: Sequence[torch.optim.Optimizer], **kwargs: Any) -> bool:
        """Drop the gradients that the last epoch left, and run ESPnet's epoch."""
        # ESPnet gives it to the training only, and to one process only.
        cls._writer = kwargs["summary_writer"]
        cls._end_epoch(Path(kwargs["options"].output_dir))
        for optimizer in optimizers:
            optimizer.zero_grad()
        cls.watch.begin_epoch()
        # ESPnet would end a training without any update as if it were finished.
        if super().train_one_epoch(optimizers=optimizers, **kwargs):
            cls.watch.refuse_epoch()
        cls.watch.check()
        cls._updates = kwargs["reporter"].get_total_count()
        return False

    @classmethod
    def _end_epoch(cls, output_dir: Path) -> None:
        """Let the training go on from the epoch that has been written."""
        if cls._writes and (output_dir / NEXT_CHECKPOINT).exists():
            (output_dir / NEXT_CHECKPOINT).replace(output_dir / CHECKPOINT)

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


class NonFiniteWatch:
    """Counts the updates in a row that are not finite, and ends the training after enough.

    So is an update if the optimiser has made no step after ``accum_grad`` batches, since a trainer
    leaves out gradients that are not finite; or if the loss of one of these was not finite, though
    the gradients were.

    Args:
        model: what is trained; its keyword arguments are the batch, with ``utt_id``.
        optimizers: of the training.
        allowed: updates in a row that may be left out.
        accum_grad: batches of an update.
        report: the text file to write before the training ends.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        allowed: int,
        accum_grad: int,
        report: Path,
    ) -> None:
        self.model, self.allowed, self.accum_grad, self.report = model, allowed, accum_grad, report
        self._watching = True
        self._batches = 0  # since the last step
        self._names: deque[list[str]] = deque(maxlen=max(1, allowed + 1) * accum_grad)
        self._batch: dict[str, Any] = {}
        self._finite: torch.Tensor | bool = True  # the losses since the last update
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._after_step)

    def begin_epoch(self) -> None:
        """Forget the batches that belong to no update, since an epoch ended between them."""
        self._batches -= self._batches % self.accum_grad

    def check(self) -> None:
        """End the training if too many updates in a row were left out.

        Raises:
            InputError: so it is.
        """
        left_out = self._batches // self.accum_grad
        if left_out > self.allowed:
            self._stop(left_out)

    def refuse_epoch(self) -> None:
        """End the training after an epoch without any update.

        Raises:
            InputError: always.
        """
        if left_out := self._batches // self.accum_grad:
            self._stop(left_out)
        raise InputError(
            f"an epoch of {self._batches} batches makes no update of accum_grad "
            f"{self.accum_grad}: lower accum_grad or the batch size"
        )

    def _stop(self, left_out: int) -> NoReturn:
        self._watching = False  # the model runs once more
        where = first_nonfinite(self.model, self._batch, loss_of=_loss_of)
        last = [name for names in list(self._names)[-self.accum_grad :] for name in names]
        lines = [f"{left_out} updates in a row without finite loss and gradient.", where, ""]
        lines += [" ".join(["batch:", *names]) for names in self._names]
        write_atomic(self.report, "\n".join(lines) + "\n")
        more = f", ... ({len(last)} in all)" if len(last) > SHOWN else ""
        raise InputError(
            f"{left_out} updates in a row had no finite loss and gradient, the last of the "
            f"utterances {', '.join(last[:SHOWN])}{more}: {where}; {self.report} lists all: look "
            "at this audio, lower the learning rate, or allow more (--nonfinite_updates)"
        )

    def _before_forward(self, model: torch.nn.Module, args: tuple, batch: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled() and self._watching):
            return
        self.check()
        if self._batches % self.accum_grad == 0:
            self._finite = True
        self._batches += 1
        self._batch = batch
        self._names.append(list(batch["utt_id"]))

    def _after_forward(self, model: torch.nn.Module, _args: tuple, output: Any) -> None:
        if model.training and torch.is_grad_enabled() and self._watching:
            # A GPU isn't waited for here, but after the update.
            self._finite = _loss_of(output).detach().isfinite().all() & self._finite

    def _after_step(self, *_: object) -> None:
        if self._finite:
            self._batches = 0
            self._names.clear()


def _loss_of(output: Any) -> torch.Tensor:
    """Return the loss in what ESPnet's models return, of which there are two forms."""
    return output["loss"] if isinstance(output, dict) else output[0]


def _copy_loss(_model: torch.nn.Module, _args: tuple, output: tuple) -> tuple:
    """Copy the loss: ESPnet divides it in place, and the statistics may hold the same tensor."""
    loss, stats, weight = output
    return loss.clone(), stats, weight


def _save(state: object, path: Path) -> None:
    write_checkpoint(state, path.with_name(NEXT_CHECKPOINT) if path.name == CHECKPOINT else path)


@contextmanager
def atomic_save() -> Iterator[None]:
    """Make ESPnet's ``torch.save(object, path)`` atomic; also inside another of these.

    ``checkpoint.pth`` is written as ``checkpoint.next.pth``.
    """
    save = torch.save
    torch.save = _save  # type: ignore[assignment]  # ESPnet gives it nothing else
    try:
        yield
    finally:
        torch.save = save
