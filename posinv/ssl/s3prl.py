"""An SSL model for S3PRL, with the features of each utterance alone.

S3PRL's own ``hf_hubert_custom`` reads every folder as a HuBERT: WavLM and data2vec come out with
wrong features and no error. Where a model normalises over time, as HuBERT-Base does, a batch
changes the features of its utterances there.

In Python::

    from posinv.ssl.s3prl import register

    register()
    from s3prl.nn import S3PRLUpstream

    model = S3PRLUpstream("posinv", "my-hubert").eval()

To use it in S3PRL's ``run_downstream.py``, start that as follows::

    python -c "import posinv.ssl.s3prl as s, runpy; s.register(); \\
        runpy.run_module('s3prl.run_downstream', run_name='__main__')" -u posinv -k my-hubert ...
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from posinv.ssl.upstream import SSLUpstream


class UpstreamExpert(nn.Module):
    """S3PRL's interface over :class:`~posinv.ssl.upstream.SSLUpstream`; S3PRL isn't imported.

    As with S3PRL's other upstreams, all weights can be trained (``--upstream_trainable``), and
    ``train()`` switches dropout on.

    Args:
        ckpt: a folder, such as ``posinv-export`` writes, or a Hugging Face hub name
            (``--upstream_ckpt``, ``path_or_url``).
        kwargs: not used; S3PRL gives ``model_config`` and ``refresh``.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, ckpt: str, **kwargs: object):
        super().__init__()
        self.upstream = SSLUpstream(ckpt, trainable=["*"])

    def get_downsample_rates(self, key: str = "hidden_states") -> int:
        """Return the samples from one frame to the next, of every hidden state."""
        return self.upstream.hop

    def forward(self, wavs: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Return the hidden states of a list of waveforms.

        Args:
            wavs: waveforms ``(T_i,)`` at 16 kHz.

        Returns:
            ``hidden_states``: L + 1 tensors ``(B, F, D)``; ``last_hidden_state``: the last. F is
            the longest waveform's T / hop, rounded up: S3PRL takes so many frames of each waveform,
            one or two more than there are. Frames after a waveform's last repeat that.

        Raises:
            InputError: a waveform that is shorter than one frame.
        """
        lengths = torch.tensor([len(wav) for wav in wavs])
        hidden, frames = self.upstream(pad_sequence(wavs, batch_first=True), lengths)
        places = torch.arange(-(-int(lengths.max()) // self.upstream.hop))
        places = torch.minimum(places, frames[:, None] - 1).to(hidden.device)  # B, F
        batch = torch.arange(len(wavs), device=hidden.device)[:, None]
        states = list(hidden[:, batch, places])
        return {"hidden_states": states, "last_hidden_state": states[-1]}


def register() -> None:
    """Make :class:`UpstreamExpert` known to S3PRL by the name ``posinv``.

    S3PRL 0.4.18 imports what torchaudio 2.9 and huggingface_hub 1.0 no longer have, older ones than
    posinv needs. Where it is gone, an empty stand-in takes its place, so that S3PRL can be
    imported. What S3PRL does with it is not possible then: MOS prediction, its own upload to the
    hub.
    """
    torchaudio: Any = importlib.import_module("torchaudio")
    huggingface_hub = importlib.import_module("huggingface_hub")
    if not hasattr(torchaudio, "sox_effects"):
        torchaudio.sox_effects = ModuleType("torchaudio.sox_effects")
        torchaudio.sox_effects.apply_effects_tensor = None
        sys.modules["torchaudio.sox_effects"] = torchaudio.sox_effects
    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = lambda backend: None
    for name in ("HfFolder", "Repository"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, None)
    hub: Any = importlib.import_module("s3prl.hub")
    hub.posinv = UpstreamExpert
