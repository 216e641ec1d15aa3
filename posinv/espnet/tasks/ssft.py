"""Self-supervised fine-tuning of an SSL model (LASER) as an ESPnet task."""

import argparse
from pathlib import Path

from espnet2.utils.get_default_kwargs import get_default_kwargs
from espnet2.utils.types import str_or_none

from posinv.data.files import read_yaml
from posinv.errors import InputError
from posinv.espnet.models import ESPnetSSFTModel
from posinv.espnet.tasks.audio import AudioTask
from posinv.models.ssft import SSFTModel


class SSFTTask(AudioTask):
    """Alignment of two views of an utterance: data ``speech`` (``sound``)."""

    model_class = SSFTModel

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's options."""
        super().add_task_arguments(parser)
        parser.get_default("required").append("ssl")
        parser.add_argument(
            "--ssl", type=str_or_none, default=None, help="The SSL model: hub name or folder"
        )
        parser.add_argument(
            "--method_file",
            type=str_or_none,
            default=None,
            help="YAML file of keyword arguments for SSFTModel; they override --model_conf",
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetSSFTModel:
        """Build the model.

        Raises:
            InputError: no such SSL model, or a bad option in ``model_conf``.
        """
        conf = dict(args.model_conf)
        if args.method_file:
            method = read_yaml(Path(args.method_file), "--method_file")
            if not isinstance(method, dict):
                raise InputError(f"--method_file {args.method_file}: must be a mapping of options")
            conf.update(method)
        unknown = sorted(conf.keys() - get_default_kwargs(SSFTModel).keys())
        if unknown:
            raise InputError(f"model_conf: unknown option {unknown[0]!r} for SSFTModel")
        # The saved config.yaml must not depend on the method file.
        args.model_conf, args.method_file = conf, None
        return ESPnetSSFTModel(args.ssl, **conf)
