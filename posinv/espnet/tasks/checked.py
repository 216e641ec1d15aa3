"""What each task checks before it builds anything, and how its training ends."""

import argparse
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from espnet2.tasks.abs_task import AbsTask
from soundfile import LibsndfileError

from posinv.data.checkpoint import read_checkpoint
from posinv.data.device import pick_device
from posinv.data.files import naming_place
from posinv.errors import InputError

SAID = 100  # times that the same warning is logged


class CheckedTask(AbsTask):
    """Base class of tasks: checks of the options that ESPnet would fail on with a traceback."""

    @classmethod
    def check_required_command_args(cls, args: argparse.Namespace) -> None:
        """Check ESPnet's options.

        Raises:
            InputError: no GPU that works where ``--ngpu`` asks for one; a file in ``--init_param``
                that isn't there, or holds more than tensors, which ESPnet would ask about, or load
                where the variable ESPNET_ALLOW_UNSAFE_TORCH_LOAD is set.
        """
        super().check_required_command_args(args)
        pick_device(args.ngpu)
        for entry in args.init_param:
            read_checkpoint(entry.split(":")[0])

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        """Do what ESPnet's options say, such as train.

        Raises:
            InputError, OSError: see :func:`telling_causes`.
        """
        with telling_causes(args.output_dir):
            super().main_worker(args)


@contextmanager
def telling_causes(output_dir: str) -> Iterator[None]:
    """Turn common failures of a training into one-line errors, and limit repeated warnings.

    Raises:
        InputError: audio that has gone, or a data-loading process that was killed.
        OSError: ``output_dir`` has no room or can't be written.
    """
    repeats = LimitRepeats()
    logging.getLogger().addFilter(repeats)
    try:
        with naming_place(output_dir):
            yield
    except LibsndfileError as error:
        # What comes from a worker process has its traceback in place of the code.
        text = error.code if isinstance(error.code, str) else str(error)
        raise InputError(
            f"{text.strip().splitlines()[-1]} This audio was there when the data was made: restore "
            "it, or make the data again; the same command goes on from the last epoch"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"{error} Often memory ran out: give a smaller num_workers, or make memory free; the "
            "same command goes on from the last epoch"
        ) from error
    finally:
        logging.getLogger().removeFilter(repeats)


class LimitRepeats(logging.Filter):
    """Lets through 100 warnings from the same line of code: a log must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._said: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        if record.levelno < logging.WARNING:
            return True
        place = (record.pathname, record.lineno)
        self._said[place] += 1
        if self._said[place] == SAID:
            record.msg = f"{record.getMessage()} (said {SAID} times; no more of these are logged)"
            record.args = ()
        return self._said[place] <= SAID
