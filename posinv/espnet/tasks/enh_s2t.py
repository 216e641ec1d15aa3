"""ESPnet's joint task of enhancement and recognition with posinv's front ends and criteria."""

import argparse

from espnet2.enh.espnet_enh_s2t_model import ESPnetEnhS2TModel
from espnet2.tasks import enh_s2t

from posinv.espnet.tasks.asr import ASRTask
from posinv.espnet.tasks.checked import CheckedTask
from posinv.espnet.tasks.enh import EnhancementTask, tell_criteria
from posinv.espnet.trainer import SeededTrainer

# ESPnet builds the two models by the tasks in this table, from the options in this list.
enh_s2t.name2task.update(enh=EnhancementTask, asr=ASRTask)
enh_s2t.enh_attributes.append("ssl")


class EnhS2TTask(CheckedTask, enh_s2t.EnhS2TTask):
    """ESPnet's joint task: the recogniser's gradient goes through a front end into enhancement.

    ``--frontend ssl`` is frozen, and its gradient trains the enhancement model in front of it.
    """

    trainer = SeededTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add ``--ssl`` to ESPnet's options."""
        super().add_task_arguments(parser)
        parser.add_argument(
            "--ssl",
            default=None,
            help="The SSL model (hub name or folder) of each criterion ssl_* in --enh_criterions "
            "that names none in its conf. The front end has its own, --frontend_conf ssl=...",
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetEnhS2TModel:
        """Build ESPnet's model; its SSL criteria get each batch's utterance ids and lengths.

        Raises:
            InputError: see :class:`~posinv.espnet.tasks.enh.EnhancementTask`; a bad option of a
                front end.
        """
        model = super().build_model(args)
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        return model


def _before_forward(model: ESPnetEnhS2TModel, args: tuple, kwargs: dict) -> None:
    tell_criteria(model.enh_model, kwargs["utt_id"], kwargs.get("speech_lengths"))
