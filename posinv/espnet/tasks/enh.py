"""ESPnet's enhancement task with posinv's separators and criteria."""

import argparse
from pathlib import Path

import torch
from espnet2.enh.espnet_model import ESPnetEnhancementModel
from espnet2.tasks import enh

from posinv.data.files import read_yaml
from posinv.errors import InputError
from posinv.espnet.criteria import CRITERIA, SSLCriterion
from posinv.espnet.trainer import SeededTrainer

# What an enhancement model is built from, criteria apart.
MODEL_OPTIONS = (
    *("encoder", "encoder_conf", "separator", "separator_conf", "decoder", "decoder_conf"),
    *("mask_module", "mask_module_conf", "model_conf"),
)


def _tell_criteria(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Hand each SSL criterion the batch's utterance ids and lengths.

    ESPnet calls a loss wrapper with the reference and the estimate alone.
    """
    for wrapper in model.loss_wrappers:
        if isinstance(wrapper.criterion, SSLCriterion):
            wrapper.criterion.utt_ids = kwargs["utt_id"]
            wrapper.criterion.lengths = kwargs.get("speech_mix_lengths")


class EnhancementTask(enh.EnhancementTask):
    """ESPnet's enhancement task; ``--ssl`` names the SSL model of posinv's criteria."""

    trainer = SeededTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--ssl``, ``--model_config`` and ``--criterion_file`` to ESPnet's options."""
        super().add_task_arguments(parser)
        parser.add_argument(
            "--ssl",
            default=None,
            help="The SSL model (hub name or folder) of each ssl_* criterion whose conf has none.",
        )
        parser.add_argument(
            "--model_config",
            default=None,
            help="YAML file whose encoder, separator and decoder, with their options, take the "
            "place of those given; such as the config.yaml of the training that --init_param "
            "comes from.",
        )
        parser.add_argument(
            "--criterion_file",
            default=None,
            help="YAML file with a list of criterions; it takes the place of --criterions.",
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetEnhancementModel:
        """Build ESPnet's model, its SSL criteria told of each batch's lengths.

        Raises:
            InputError: an unknown criterion, wrapper or separator, an unknown option of one of
                posinv's, or an SSL criterion without a model.
        """
        # All is written back, so that the saved config.yaml stands alone.
        if getattr(args, "model_config", None):
            for name, value in read_model(Path(args.model_config)).items():
                setattr(args, name, value)
            args.model_config = None
        if getattr(args, "criterion_file", None):
            args.criterions = _read_criteria(Path(args.criterion_file))
            args.criterion_file = None
        _check_name("separator", args.separator, enh.separator_choices)
        for criterion in args.criterions:
            _check_name("criterions: name", criterion["name"], enh.criterion_choices)
            _check_name("criterions: wrapper", criterion["wrapper"], enh.loss_wrapper_choices)
            if criterion["name"] in CRITERIA:
                conf = criterion.setdefault("conf", {})
                conf.setdefault("ssl", getattr(args, "ssl", None))
                if conf["ssl"] is None:
                    raise InputError(
                        f"criterion {criterion['name']}: no SSL model; give --ssl, or 'ssl:' in "
                        "the criterion's conf"
                    )
        model = super().build_model(args)
        if model.loss_wrappers:
            model.register_forward_pre_hook(_tell_criteria, with_kwargs=True)
        return model


def read_model(path: Path) -> dict[str, object]:
    """Read an enhancement model's options (encoder, separator, decoder, ...) from YAML.

    Args:
        path: a configuration for ``enh_train``, or the ``config.yaml`` that it left.

    Raises:
        InputError: no such file, not YAML, or no model there.
    """
    config = read_yaml(path, "--model_config")
    if not isinstance(config, dict) or not {"encoder", "separator", "decoder"} <= config.keys():
        raise InputError(f"--model_config {path}: must have encoder, separator and decoder")
    defaults = {f"{name}_conf": {} for name in ("encoder", "separator", "decoder")}
    return defaults | {name: config[name] for name in MODEL_OPTIONS if name in config}


def _read_criteria(path: Path) -> list[dict]:
    criteria = read_yaml(path, "--criterion_file")
    if not isinstance(criteria, list) or not all(
        isinstance(criterion, dict) and {"name", "wrapper", "wrapper_conf"} <= criterion.keys()
        for criterion in criteria
    ):
        raise InputError(
            f"--criterion_file {path}: must be a list of criteria with name, conf, wrapper and "
            "wrapper_conf"
        )
    return criteria


def _check_name(option: str, name: str, choices) -> None:
    if name not in choices.classes:
        raise InputError(f"{option}: unknown name {name!r}; one of {', '.join(choices.classes)}")
