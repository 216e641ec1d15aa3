"""ESPnet's enhancement task with posinv's separators and criteria."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from espnet2.enh.espnet_model import ESPnetEnhancementModel
from espnet2.tasks import enh
from espnet2.train.class_choices import ClassChoices
from torch import Tensor

from posinv.data.files import read_yaml
from posinv.errors import InputError
from posinv.espnet.criteria import CRITERIA, SSLCriterion
from posinv.espnet.tasks.checked import CheckedTask
from posinv.espnet.trainer import SeededTrainer

# The options that define an enhancement model, without its criteria.
MODEL_OPTIONS = (
    *("encoder", "encoder_conf", "separator", "separator_conf", "decoder", "decoder_conf"),
    *("mask_module", "mask_module_conf", "model_conf"),
)


def tell_criteria(
    model: ESPnetEnhancementModel, utt_ids: Sequence[str], lengths: Tensor | None
) -> None:
    """Set a batch's utterance ids and lengths in each SSL criterion, before the model's forward.

    ESPnet's loss wrappers pass only the reference and the estimate to a criterion.

    Args:
        model: the enhancement model.
        utt_ids: the B utterance ids.
        lengths: ``(B,)`` int, in samples. None: no row is padded, as in ESPnet's chunk iterator.
    """
    for wrapper in model.loss_wrappers:
        if isinstance(wrapper.criterion, SSLCriterion):
            wrapper.criterion.utt_ids = utt_ids
            wrapper.criterion.lengths = lengths


def _before_forward(model: ESPnetEnhancementModel, args: tuple, kwargs: dict) -> None:
    tell_criteria(model, kwargs["utt_id"], kwargs.get("speech_mix_lengths"))


class EnhancementTask(CheckedTask, enh.EnhancementTask):
    """ESPnet's enhancement task; ``--ssl`` names the SSL model of posinv's criteria."""

    trainer = SeededTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--ssl``, ``--model_config`` and ``--criterion_file`` to ESPnet's options."""
        super().add_task_arguments(parser)
        parser.add_argument(
            "--ssl",
            default=None,
            help="The SSL model (hub name or folder) of each criterion ssl_* that names none in "
            "its conf.",
        )
        parser.add_argument(
            "--model_config",
            default=None,
            help="YAML file with encoder, separator and decoder and their options, which replace "
            "those given otherwise. To fine-tune: the config.yaml of the training whose "
            "checkpoint --init_param names.",
        )
        parser.add_argument(
            "--criterion_file",
            default=None,
            help="YAML file with a list of criteria, which replaces --criterions.",
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetEnhancementModel:
        """Build ESPnet's model; its SSL criteria get each batch's utterance ids and lengths.

        Raises:
            InputError: an unknown criterion, wrapper or separator; a bad option of one of
                posinv's; an SSL criterion without an SSL model.
        """
        # The saved config.yaml must not depend on the two files.
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
            model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        return model


def read_model(path: Path) -> dict[str, object]:
    """Read an enhancement model's options (encoder, separator, decoder, ...) from YAML.

    Args:
        path: a configuration for ``enh_train``, or the ``config.yaml`` that it wrote.

    Raises:
        InputError: no such file, not YAML, or no encoder, separator or decoder in it.
    """
    config = read_yaml(path, "--model_config")
    if not isinstance(config, dict) or not {"encoder", "separator", "decoder"} <= config.keys():
        raise InputError(f"--model_config {path}: must have encoder, separator and decoder")
    options: dict[str, object] = {"encoder_conf": {}, "separator_conf": {}, "decoder_conf": {}}
    return options | {name: config[name] for name in MODEL_OPTIONS if name in config}


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


def _check_name(option: str, name: str, choices: ClassChoices) -> None:
    if name not in choices.classes:
        raise InputError(f"{option}: unknown name {name!r}; one of {', '.join(choices.classes)}")
