"""Registration of posinv's classes in ESPnet's tables, so that YAML files can name them."""

import sys

from espnet2.asr.encoder.linear_encoder import LinearEncoder
from espnet2.tasks import abs_task, asr, enh
from espnet2.train.class_choices import ClassChoices

from posinv.espnet.criteria import CRITERIA
from posinv.espnet.encoders import BLSTMEncoder
from posinv.espnet.frontends import EnhSSLFrontend, LayersFrontend, SSLFrontend
from posinv.espnet.optimizers import LinearWarmupDecay, S3PRLAdamW
from posinv.espnet.separator import DemucsSeparator


def register() -> None:
    """Put posinv's separators, criteria, front ends, encoders and S3PRL's optimiser into ESPnet.

    ``import posinv.espnet`` calls it; another call changes nothing. ``espnet2.tasks.enh_s2t``
    copies the tables when it is imported, so its copies get the classes too.
    """
    _insert(enh.separator_choices, demucs=DemucsSeparator)
    _insert(enh.criterion_choices, **CRITERIA)
    _insert(asr.frontend_choices, ssl=SSLFrontend, enh_ssl=EnhSSLFrontend, layers=LayersFrontend)
    # "linear" is ESPnet's own class, which ESPnet does not list for ASR. SUPERB's phoneme head is
    # a linear layer.
    encoders = {"linear": LinearEncoder, "blstm": BLSTMEncoder}
    _insert(asr.encoder_choices, **encoders)
    abs_task.optim_classes["s3prl_adamw"] = S3PRLAdamW
    abs_task.scheduler_classes["linear_warmup_decay"] = LinearWarmupDecay
    if enh_s2t := sys.modules.get("espnet2.tasks.enh_s2t"):
        _insert(enh_s2t.enh_separator_choices, demucs=DemucsSeparator)
        _insert(enh_s2t.asr_encoder_choices, **encoders)


def _insert(choices: ClassChoices, **classes: type) -> None:
    for name, cls in classes.items():
        if not issubclass(cls, choices.base_type):
            raise TypeError(f"{cls} must inherit {choices.base_type} to be a {choices.name}")
        choices.classes[name] = cls
