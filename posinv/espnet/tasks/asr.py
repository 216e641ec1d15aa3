"""ESPnet's ASR task with posinv's front ends; it also trains phoneme recognition heads."""

import argparse

from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks import asr

from posinv.espnet.error_calculator import ErrorCalculator
from posinv.espnet.tasks.checked import CheckedTask
from posinv.espnet.trainer import SeededTrainer


class ASRTask(CheckedTask, asr.ASRTask):
    """ESPnet's ASR task; jiwer computes the error rates of validation."""

    trainer = SeededTrainer

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        """Build ESPnet's model."""
        model = super().build_model(args)
        if old := getattr(model, "error_calculator", None):
            model.error_calculator = ErrorCalculator(
                old.char_list, old.space, old.blank, old.report_cer, old.report_wer
            )
        return model
