"""DEMAND, recorded noise of 18 environments, for noisy LibriSpeech and the noise-robust variant.

J. Thiemann, N. Ito and E. Vincent, *The Diverse Environments Multi-channel Acoustic Noise Database*
(https://zenodo.org/record/1227121): a folder an environment, with ``ch01.wav`` to ``ch16.wav``, of
five minutes each, at 16 kHz or 48 kHz.
"""

from pathlib import Path

import numpy as np

from posinv.corpora.prepared import Contents, Prepared
from posinv.data.audio import SAMPLING_RATE, read_audio, write_audio
from posinv.data.files import atomic_folder
from posinv.data.tables import write_table
from posinv.errors import InputError

# The split of NR-SSFT, by the authors of LASER: indoor noises are seen in training.
SEEN = (
    *("DKITCHEN", "DWASHING", "DLIVING", "TMETRO", "TBUS", "TCAR"),
    *("OOFFICE", "OHALLWAY", "OMEETING", "PSTATION", "PCAFETER", "PRESTO"),
)
UNSEEN = ("NFIELD", "NRIVER", "NPARK", "STRAFFIC", "SPSQUARE", "SCAFE")


def prepare(src: Path | str, out: Path | str) -> Prepared:
    """Write channel 1 of every environment at 16 kHz: ``seen`` and ``unseen``.

    Args:
        src: DEMAND's folder, ``<environment>/ch01.wav``; other rates (SCAFE comes at 48 kHz
            only) are resampled.
        out: parent of ``seen`` and ``unseen``, each with ``<environment>.flac`` and a ``wav.scp``
            that lists them. Each is written atomically; an earlier one is replaced.

    Raises:
        InputError: environments are missing, or a file isn't audio.
    """
    src, out = Path(src), Path(out)
    missing = [name for name in (*SEEN, *UNSEEN) if not (src / name / "ch01.wav").is_file()]
    if missing:
        raise InputError(
            f"{src}: no ch01.wav of {' '.join(missing)}: fetch what is missing from "
            f"https://zenodo.org/record/1227121 (wanted: {src / missing[0] / 'ch01.wav'})"
        )
    made = {}
    for split, names in (("seen", SEEN), ("unseen", UNSEEN)):
        samples = 0
        with atomic_folder(out / split, replaces="wav.scp") as fresh:
            for name in names:
                x = read_audio(str(src / name / "ch01.wav"), SAMPLING_RATE, resample=True)
                x = x / max(1.0, np.abs(x).max())  # resampling may overshoot
                write_audio(fresh / f"{name}.flac", x, SAMPLING_RATE)
                samples += len(x)
            entries = {name: out / split / f"{name}.flac" for name in names}
            write_table(fresh / "wav.scp", entries)
        made[out / split] = Contents(len(names), minutes=samples / SAMPLING_RATE / 60)
    return Prepared(made)
