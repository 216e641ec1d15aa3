"""What each task checks before it builds anything."""

import argparse

from espnet2.tasks.abs_task import AbsTask

from posinv.data.checkpoint import read_checkpoint
from posinv.data.device import pick_device


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
