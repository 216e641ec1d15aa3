"""ESPnet's ``asr_inference`` with posinv's classes registered."""

from espnet2.bin.asr_inference import main

import posinv.espnet  # noqa: F401  (registers)
from posinv.bin.cli import run

if __name__ == "__main__":
    run(main)
