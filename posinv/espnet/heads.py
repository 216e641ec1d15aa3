"""All heads on one frozen front end, trained at once: the front end runs once for each batch.

Each head is a training by ESPnet's ASR task as it is: model, optimiser, schedule, epochs,
checkpoints and statistics are those of ``asr_train``. Only its front end is ``layers``, which takes
the layers computed before, and where ESPnet's trainer asks for its next batch it waits until the
front end has computed it. Each head therefore runs in a thread, and one thread at a time. The
random generators are set to the head's own state for that time. So a head is trained as it would be
alone: the others, resumed trainings and the end of others change nothing.
"""

import argparse
import dataclasses
import logging
import random
import threading
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from espnet2.fileio.read_text import read_2columns_text
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.tasks import asr
from espnet2.torch_utils.device_funcs import to_device
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.dataset import ESPnetDataset
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import Reporter, SubReporter, aggregate
from espnet2.train.trainer import autocast_args
from espnet2.utils.build_dataclass import build_dataclass
from torch.utils.data import DataLoader

from posinv.errors import InputError
from posinv.espnet.frontends import SSLFrontend
from posinv.espnet.layer_cache import FileCache
from posinv.espnet.tasks.asr import ASRTask
from posinv.espnet.tasks.checked import telling_causes
from posinv.espnet.trainer import SeededTrainer, atomic_save
from posinv.head_arguments import split_arguments
from posinv.ssl.load import load_config

# The options that the heads of one command share: front end, audio, batches, device.
SHARED = (
    *("frontend", "frontend_conf", "input_size", "train_dtype", "use_amp", "ngpu", "log_level"),
    *("train_shape_file", "valid_shape_file", "num_workers", "max_cache_size", "max_cache_fd"),
    *("valid_max_cache_size", "allow_multi_rates", "multi_task_dataset", "use_preprocessor"),
    *("preprocessor", "preprocessor_conf", "speech_volume_normalize", "rir_scp", "rir_apply_prob"),
    *("noise_scp", "noise_apply_prob", "noise_db_range", "short_noise_thres"),
    *("batch_type", "batch_size", "batch_bins", "valid_batch_type", "valid_batch_size"),
    *("valid_batch_bins", "fold_length", "sort_in_batch", "sort_batch", "shuffle_within_batch"),
    *("drop_last_iter", "min_batch_size", "num_iters_per_epoch"),
    *("float32_matmul_precision", "use_tf32", "cudnn_enabled", "cudnn_benchmark"),
    *("cudnn_deterministic", "detect_anomaly"),
    *(field.name for field in dataclasses.fields(DistributedOption) if field.name != "distributed"),
)
# What ESPnet can do otherwise and heads can't.
FIXED = {
    **{"iterator_type": "sequence", "valid_iterator_type": None, "multiple_iterator": False},
    **{"collect_stats": False, "use_wandb": False, "sharded_ddp": False, "use_deepspeed": False},
}
PHASES = ("train", "valid")

Batch = tuple[list[str], torch.Tensor, torch.Tensor]  # ids, layers (B, F, L, D), frame counts
Pass = tuple[int, str]  # epoch and phase; "train" is before "valid", also in the alphabet


# ------------------------------------------------------------------------------- the arguments
def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Parse the arguments of ``heads_train``, see there.

    Returns:
        ESPnet's options of what the heads share; in ``heads`` those of each head; ``sweep_updates``
        and ``cache_dir``.

    Raises:
        InputError: no head, one twice, or heads that differ in what they must share.
    """
    common, heads = split_arguments(arguments)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--sweep_updates", type=int)
    parser.add_argument("--cache_dir", type=Path)
    own, common = parser.parse_known_args(common)
    if not heads:
        raise InputError("no --head DIR: give one for each head")
    if own.sweep_updates is not None and own.sweep_updates < 1:
        raise InputError(f"--sweep_updates {own.sweep_updates}: must be at least 1")
    own.heads = [
        _task_arguments([*common, *options, "--output_dir", directory])
        for directory, options in heads.items()
    ]
    for head in own.heads:
        _check_head(head, own.heads[0])
    args = Namespace(**{**vars(own.heads[0]), **vars(own)})
    args.seed = _task_arguments(common).seed
    for phase in PHASES:
        name = f"{phase}_data_path_and_name_and_type"
        setattr(args, name, _data(own.heads[0], phase, speech=True))
    return args


def _task_arguments(arguments: Sequence[str]) -> Namespace:
    return ASRTask.get_parser().parse_args(arguments)


def _data(args: Namespace, phase: str, speech: bool) -> list[tuple[str, str, str]]:
    """Return a head's entries of path, name and type, for speech or for all else."""
    entries = getattr(args, f"{phase}_data_path_and_name_and_type")
    return [entry for entry in entries if (entry[1] == "speech") == speech]


def _check_head(head: Namespace, first: Namespace) -> None:
    of = f"--head {head.output_dir}"
    for name, value in FIXED.items():
        if getattr(head, name) != value:
            raise InputError(f"{of}: --{name} {getattr(head, name)}: heads need {value}")
    if head.use_matplotlib and head.num_att_plot:
        raise InputError(f"{of}: --num_att_plot {head.num_att_plot}: heads have no plots: give 0")
    pairs = {name: (getattr(head, name), getattr(first, name)) for name in SHARED}
    for phase in PHASES:
        pairs[f"{phase}_data_path_and_name_and_type"] = (
            _data(head, phase, speech=True),
            _data(first, phase, speech=True),
        )
    for name, (value, expected) in pairs.items():
        if value != expected:
            raise InputError(
                f"{of}: --{name} {value}: --head {first.output_dir} has {expected}, and the heads "
                "of one command share it: give both the same, or train them by two commands"
            )


# ------------------------------------------------------------------------------------- one head
class LayersTask(ASRTask):
    """The ASR task, with the model's front end replaced by the weighted sum of given layers.

    ``config.yaml`` and the checkpoint are those of the model with the whole front end.
    """

    @classmethod
    def build_model(cls, args: Namespace) -> ESPnetASRModel:
        """Build the model without the frozen part of its front end.

        Raises:
            InputError: another front end than ``ssl`` and ``enh_ssl``.
        """
        frontend, conf = args.frontend, args.frontend_conf
        _frontend_class(frontend)
        ssl = load_config(conf["ssl"])
        num_layers = None if conf.get("layer") is not None else ssl.num_hidden_layers + 1
        args.frontend = "layers"
        args.frontend_conf = {"size": ssl.hidden_size, "num_layers": num_layers}
        try:
            return super().build_model(args)
        finally:
            args.frontend, args.frontend_conf = frontend, conf


def build_frontend(name: str, conf: Mapping[str, Any]) -> SSLFrontend:
    """Build the front end ``ssl`` or ``enh_ssl``.

    Raises:
        InputError: another front end, or its options are bad.
    """
    return _frontend_class(name)(**conf)


def _frontend_class(name: str) -> type[SSLFrontend]:
    found = asr.frontend_choices.classes.get(name, AbsFrontend)
    if not issubclass(found, SSLFrontend):
        raise InputError(f"--frontend {name}: heads need ssl or enh_ssl")
    return found


@torch.no_grad()
def compute_layers(
    frontend: SSLFrontend,
    waves: torch.Tensor,
    lengths: torch.Tensor,
    names: Sequence[Hashable] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :class:`LayersTask`'s models take in place of waveforms and their lengths.

    Args:
        frontend: of the heads.
        waves: ``(B, T)``.
        lengths: ``(B,)``, in samples.
        names: see :meth:`~posinv.espnet.frontends.SSLFrontend.layers`.

    Returns:
        The layers ``(B, F, L, D)`` and frame counts ``(B,)``.
    """
    return _as_input(*frontend.layers(waves, lengths, names))


def _as_input(layers: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return layers.permute(1, 2, 0, 3), frames


class _HeadStoppedError(Exception):
    """Ends a head's training."""


class Head(threading.Thread):
    """One head's training, which goes on only while the caller of :meth:`go_on` waits.

    Args:
        args: ESPnet's options.
        num_batches: number of batches in each phase.

    Raises:
        InputError: no text, or none for an utterance.

    Attributes:
        waits_for: the epoch and phase of which the training wants the next batch; None: it ended.
        values: for each epoch so far, the validation value that chooses the best epoch.
    """

    def __init__(self, args: Namespace, num_batches: Mapping[str, int]) -> None:
        super().__init__(name="/".join(Path(args.output_dir).parts[-2:]), daemon=True)
        self.args, self.num_batches = args, num_batches
        self.targets = {phase: _Targets(args, phase) for phase in PHASES}
        self.waits_for: Pass | None = None
        self.values: dict[int, float] = {}
        criteria: list[Sequence[str]] = [*args.best_model_criterion, ("valid", "loss", "min")]
        _, self.criterion, self.mode = next(c for c in criteria if c[0] == "valid")
        self._items: SimpleQueue[Batch | Exception | None] = SimpleQueue()
        self._answers: SimpleQueue[Pass | BaseException | None] = SimpleQueue()
        self._draws = _random_state()
        self._device = torch.cuda.current_device() if args.ngpu else None

    def go_on(self, item: Batch | Exception | None) -> None:
        """Let the training go on until it wants the next batch, or ends.

        Args:
            item: what it waits for: a batch; None: the pass is over; an exception ends it.

        Raises:
            InputError: bad input of this head. Its other exceptions are raised, too.
        """
        ours = _random_state()
        _set_random_state(self._draws)
        self._items.put(item)
        answer = self._answers.get()
        self._draws = _random_state()
        _set_random_state(ours)
        if isinstance(answer, InputError):
            raise InputError(f"--head {self.args.output_dir}: {answer}") from answer
        if isinstance(answer, BaseException):
            raise answer
        self.waits_for = answer

    def stop(self) -> None:
        """End the training, whether it waits or not."""
        self._items.put(_HeadStoppedError())
        self.waits_for = None
        if self.is_alive():
            self.join(timeout=60)

    def run(self) -> None:
        """Train; called by :meth:`start`."""
        answer = None
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self._next_item()
            # ESPnet's trainer keeps what belongs to a training in its class.
            trainer = type("HeadTrainer", (_HeadTrainer,), {})
            task = cast(type[_HeadTask], type("HeadTask", (_HeadTask,), {"trainer": trainer}))
            task.main_worker(self.args)
        except _HeadStoppedError:
            pass
        except BaseException as error:
            answer = error
        self._answers.put(answer)

    def batches(self, epoch: int, phase: str) -> Iterator[tuple[list[str], dict]]:
        """Yield what ESPnet's iterators do, with layers for ``speech``; in the head's thread."""
        # torch's DataLoader makes this draw, on which those after it depend.
        torch.empty((), dtype=torch.int64).random_()
        while True:
            self._answers.put((epoch, phase))
            item = self._next_item()
            if item is None:
                return
            utt_ids, layers, frames = item
            targets = self.targets[phase](utt_ids)
            yield utt_ids, {"speech": layers, "speech_lengths": frames, **targets}

    def _next_item(self) -> Batch | None:
        item = self._items.get()
        if isinstance(item, Exception):
            raise item
        return item


def _this_head() -> Head:
    return cast(Head, threading.current_thread())


class _Targets:
    """A head's targets, tokenised by its own preprocessor."""

    def __init__(self, args: Namespace, phase: str) -> None:
        of, entries = f"--head {args.output_dir}", _data(args, phase, speech=False)
        if "text" not in [name for _, name, _ in entries]:
            raise InputError(f"{of}: no text in --{phase}_data_path_and_name_and_type")
        self._dataset = ESPnetDataset(
            entries,
            float_dtype=args.train_dtype,
            preprocess=ASRTask.build_preprocess_fn(args, train=phase == "train"),
        )
        self._collate = ASRTask.build_collate_fn(args, train=phase == "train")
        self._tokenised: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
        utt_ids = read_2columns_text(getattr(args, f"{phase}_shape_file")[0]).keys()
        for path, name, _ in entries:
            if missing := utt_ids - self._dataset.loader_dict[name].keys():
                raise InputError(
                    f"{of}: {path}: no {name} for utterance {min(missing)} ({len(missing)} such)"
                )

    def __call__(self, utt_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the targets of a batch, padded, and their lengths."""
        for utt_id in utt_ids:
            if utt_id not in self._tokenised:
                self._tokenised[utt_id] = self._dataset[utt_id]
        return self._collate([self._tokenised[utt_id] for utt_id in utt_ids])[1]


class _Batches:
    def __init__(self, head: Head, epoch: int, phase: str) -> None:
        self._head, self._epoch, self._phase = head, epoch, phase

    def __len__(self) -> int:
        return self._head.num_batches[self._phase]

    def __iter__(self) -> Iterator[tuple[list[str], dict]]:
        return self._head.batches(self._epoch, self._phase)


class _IterFactory(AbsIterFactory):
    def __init__(self, head: Head, phase: str) -> None:
        self._head, self._phase = head, phase

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> _Batches:
        return _Batches(self._head, epoch, self._phase)


class _HeadTrainer(SeededTrainer):
    """ESPnet's trainer, which tells the head its validation values."""

    @staticmethod
    def resume(*args: Any, reporter: Reporter, **parts: Any) -> None:
        SeededTrainer.resume(*args, reporter=reporter, **parts)
        head = _this_head()
        for epoch, stats in reporter.stats.items():
            if head.criterion in stats["valid"]:
                head.values[epoch] = stats["valid"][head.criterion]

    @classmethod
    def validate_one_epoch(cls, **parts: Any) -> None:
        super().validate_one_epoch(**parts)
        head, reporter = _this_head(), cast(SubReporter, parts["reporter"])
        if head.criterion in reporter.stats:
            head.values[reporter.get_epoch()] = aggregate(reporter.stats[head.criterion])


class _HeadTask(LayersTask):
    """The task of a head, in its thread."""

    trainer = _HeadTrainer

    @classmethod
    def build_iter_factory(
        cls, args: Namespace, distributed_option: DistributedOption, mode: str, kwargs: None = None
    ) -> AbsIterFactory:
        return _IterFactory(_this_head(), mode)


# ------------------------------------------------------------------------------------ all heads
class HeadsTask(ASRTask):
    """Training of all heads; ``main(args=parse_arguments(...))`` starts it, as any task of ESPnet.

    It reads speech alone; the heads read their targets themselves.
    """

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the name of the speech."""
        return ("speech",)

    @classmethod
    def main_worker(cls, args: Namespace) -> None:
        """Train, in one of perhaps several processes."""
        option = build_dataclass(DistributedOption, args)
        option.init_options()
        rank = option.dist_rank or 0
        logging.basicConfig(
            level="ERROR" if rank else args.log_level,
            format="%(asctime)s (%(module)s:%(lineno)d) %(threadName)s %(levelname)s: %(message)s",
        )
        option.init_torch_distributed()
        for head in args.heads:
            vars(head).update(dataclasses.asdict(option), version=args.version)
        frontend = build_frontend(args.frontend, args.frontend_conf)
        with telling_causes(args.output_dir), _file_cache(frontend, args, rank):
            factories = {phase: cls.build_iter_factory(args, option, phase) for phase in PHASES}
            num_batches = {phase: len(factories[phase].build_iter(1)) for phase in PHASES}
            heads = [Head(head, num_batches) for head in args.heads]

            def batches(epoch: int, phase: str) -> Iterator[Batch]:
                set_all_random_seed(args.seed + epoch)
                loader = factories[phase].build_iter(epoch)
                return _layer_batches(frontend, loader, args, phase)

            with atomic_save(), _process_group_of_all():
                train_heads(heads, batches, args.sweep_updates)


def _layer_batches(
    frontend: SSLFrontend, loader: DataLoader, args: Namespace, phase: str
) -> Iterator[Batch]:
    """Yield the layers of a loader's batches; audio is read only for what the cache lacks."""
    drawn = args.use_preprocessor and (
        args.preprocessor != "default" or args.preprocessor_conf or args.rir_scp or args.noise_scp
    )
    device = "cuda" if args.ngpu else "cpu"
    like = torch.empty(0, dtype=getattr(torch, args.train_dtype), device=device)
    # Training and validation set may have different utterances of one name.
    listed = cast(Iterable[list[str]], loader.batch_sampler)
    batches = [[(phase, utt_id) for utt_id in batch] for batch in listed]
    cached = [frontend.has(names) for names in batches]
    missing = [batch for batch, there in zip(listed, cached, strict=True) if not there]
    audio = iter(_with_batches(loader, missing) if missing else ())
    for names, there in zip(batches, cached, strict=True):
        if there:
            layers = _as_input(*frontend.layers_of(names, like))
        else:
            batch = to_device(next(audio)[1], device)
            with torch.autocast("cuda", enabled=args.use_amp, **autocast_args):
                waves, lengths = batch["speech"], batch["speech_lengths"]
                layers = compute_layers(frontend, waves, lengths, None if drawn else names)
        yield [utt_id for _, utt_id in names], *layers


def _with_batches(loader: DataLoader, batches: Iterable[list[str]]) -> DataLoader:
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def train_heads(
    heads: Sequence[Head],
    batches: Callable[[int, str], Iterator[Batch]],
    sweep_updates: int | None = None,
) -> None:
    """Run the heads' trainings side by side.

    Heads that were resumed at different epochs, or end at different ones, each get the passes that
    they wait for.

    Args:
        heads: the heads, not started.
        batches: makes the batches of an epoch's phase, ``train`` or ``valid``.
        sweep_updates: after so many updates of a head, it ends unless it is the best of those with
            its parent directory and random seed. None: no head ends so.
    """
    try:
        for head in heads:
            head.start()
            head.go_on(None)
        while waiting := [head.waits_for for head in heads if head.waits_for]:
            epoch, phase = min(waiting)
            for head in heads:
                if head.waits_for == (epoch, "train") and _loses(head, heads, sweep_updates):
                    head.stop()
            active = [head for head in heads if head.waits_for == (epoch, phase)]
            for batch in batches(epoch, phase) if active else ():
                for head in active:
                    head.go_on(batch)
            for head in active:
                head.go_on(None)
    finally:
        for head in heads:
            head.stop()


def _loses(head: Head, heads: Sequence[Head], sweep_updates: int | None) -> bool:
    """Whether a head, before an epoch of training, is to end since another is better."""
    if sweep_updates is None:
        return False

    def group(head: Head) -> tuple[Path, int]:
        return Path(head.args.output_dir).parent, head.args.seed

    rivals = [rival for rival in heads if group(rival) == group(head)]
    updates = [rival.num_batches["train"] // rival.args.accum_grad for rival in rivals]
    decided = max(-(-sweep_updates // max(number, 1)) for number in updates)
    assert head.waits_for
    if head.waits_for[0] <= decided or len(rivals) == 1:
        return False

    def value(rival: Head) -> float:
        found = rival.values.get(min(decided, max(rival.values, default=0)), np.nan)
        return np.inf if np.isnan(found) else found * {"min": 1, "max": -1}[rival.mode]

    best = min(rivals, key=value)
    if np.isinf(value(best)):
        raise InputError(
            f"--sweep_updates: {best.criterion} on the validation set is no number for any head in "
            f"{group(head)[0]}: correct best_model_criterion or the learning rates"
        )
    if best is head:
        return False
    logging.info(
        "%s ends: in epoch %d its %s on the validation set was %g, that of %s was %g",
        *(head.args.output_dir, decided, head.criterion, abs(value(head))),
        *(best.args.output_dir, abs(value(best))),
    )
    return True


@contextmanager
def _file_cache(frontend: SSLFrontend, args: Namespace, rank: int) -> Iterator[None]:
    """Give the front end a cache in ``--cache_dir``, if there is one.

    Each front end has its own folder there, named by a digest of all that its layers depend on.
    """
    if args.cache_dir is None:
        yield
        return
    precision = "bf16" if args.use_amp else args.float32_matmul_precision
    num_layers = 1 if frontend.weights is None else len(frontend.weights)
    folder = args.cache_dir / f"{frontend.digest()}-{precision}"
    cache = FileCache(folder, num_layers, frontend.output_size(), rank)
    files = {*args.train_shape_file[:1], *args.valid_shape_file[:1]}
    lengths = [int(s.split(",")[0]) for f in files for s in read_2columns_text(f).values()]
    try:
        if not rank:
            cache.require_room(frontend.frames(torch.tensor(lengths)).tolist())
        logging.info("layers of %d utterances are in %s", len(cache), folder)
        frontend.cache = cache
        yield
    finally:
        cache.close()


@contextmanager
def _process_group_of_all() -> Iterator[None]:
    """Let each head's training find the group of processes that is there already."""
    init = DistributedOption.init_torch_distributed
    DistributedOption.init_torch_distributed = lambda self: None
    try:
        yield
    finally:
        DistributedOption.init_torch_distributed = init


def _random_state() -> tuple:
    """Return the state of all generators that ESPnet and posinv draw from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
