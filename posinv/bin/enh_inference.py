"""ESPnet's ``enh_inference`` with posinv's classes registered."""

from espnet2.bin.enh_inference import main

import posinv.espnet  # noqa: F401  (registers)
from posinv.bin.cli import run

if __name__ == "__main__":
    run(main)
