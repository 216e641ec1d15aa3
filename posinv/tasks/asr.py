"""ESPnet's ASR task with posinv's front ends; it trains phoneme heads as well."""

from espnet2.tasks import asr

import posinv.tasks.register  # noqa: F401  (registers on import)
from posinv.tasks.trainer import SeededTrainer


class ASRTask(asr.ASRTask):
    """ESPnet's ASR task; the front ends ``ssl`` and ``enh_ssl`` are registered."""

    trainer = SeededTrainer
