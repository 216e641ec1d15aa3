"""ESPnet's ASR task with posinv's front ends; it trains phoneme heads as well."""

import argparse

from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.tasks import asr

from posinv.espnet.error_calculator import ErrorCalculator
from posinv.espnet.trainer import SeededTrainer


class ASRTask(asr.ASRTask):
    """ESPnet's ASR task, its validation's error rates by jiwer."""

    trainer = SeededTrainer

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetASRModel:
        """Build ESPnet's model."""
        model = super().build_model(args)
        if theirs := getattr(model, "error_calculator", None):
            model.error_calculator = ErrorCalculator(
                theirs.char_list, theirs.space, theirs.blank, theirs.report_cer, theirs.report_wer
            )
        return model
