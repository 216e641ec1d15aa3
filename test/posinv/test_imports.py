"""What each module may import, in fresh interpreters."""

import pkgutil
import subprocess
import sys

import posinv

BLOCK = """
import importlib, sys
for name in {blocked!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""


def run(blocked, modules):
    code = BLOCK.format(blocked=blocked, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_espnet_is_imported_in_its_own_room_alone():
    names = [module.name for module in pkgutil.walk_packages(posinv.__path__, "posinv.")]
    outside = [n for n in names if not n.startswith(("posinv.espnet", "posinv.bin."))]
    assert {"posinv.models.ssft", "posinv.losses.functional"} <= set(outside)
    run(["espnet2"], outside)


def test_the_loss_needs_torch_and_numba_alone():
    run(["espnet2", "transformers", "soundfile", "torchaudio", "scipy"], ["posinv.softdtw"])
    run(["espnet2", "transformers", "soundfile", "torchaudio"], ["posinv.losses.functional"])


def test_registers_whatever_was_imported_before():
    code = """
import espnet2.tasks.enh_s2t as enh_s2t
import posinv.espnet
from espnet2.tasks import asr, enh
assert "demucs" in enh.separator_choices.classes and "ssl_softdtw" in enh.criterion_choices.classes
assert "ssl" in asr.frontend_choices.classes and "ssl" in enh_s2t.frontend_choices.classes
assert "demucs" in enh_s2t.enh_separator_choices.classes
assert "blstm" in enh_s2t.asr_encoder_choices.classes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
