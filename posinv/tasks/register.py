"""Put posinv's classes into ESPnet's tables, where YAML names find them.

Importing this module registers. Every posinv task imports it, so the classes are there in the
fresh interpreters that multi-process training spawns; a command that goes through ESPnet's own
tasks (``enh_inference``, ``asr_inference``) imports it before anything of ``espnet2.bin``, since
``espnet2.tasks.enh_s2t`` copies the tables when it is imported.
"""

from espnet2.asr.encoder.linear_encoder import LinearEncoder
from espnet2.tasks import asr, enh
from espnet2.train.class_choices import ClassChoices

from posinv.criterion import CRITERIA
from posinv.encoder import BLSTMEncoder
from posinv.frontend import EnhSSLFrontend, SSLFrontend
from posinv.separator import DemucsSeparator


def _insert(choices: ClassChoices, **classes: type) -> None:
    for name, cls in classes.items():
        if not issubclass(cls, choices.base_type):
            raise TypeError(f"{cls} must inherit {choices.base_type} to be a {choices.name}")
        choices.classes[name] = cls


_insert(enh.separator_choices, demucs=DemucsSeparator)
_insert(enh.criterion_choices, **CRITERIA)
_insert(asr.frontend_choices, ssl=SSLFrontend, enh_ssl=EnhSSLFrontend)
# ESPnet has this class and does not list it for ASR; SUPERB's phoneme head is a linear layer.
_insert(asr.encoder_choices, linear=LinearEncoder, blstm=BLSTMEncoder)
