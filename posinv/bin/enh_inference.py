"""ESPnet's ``enh_inference`` with posinv's classes registered."""

import posinv.tasks.register  # noqa: F401, I001  (before espnet2.bin, see there)
from espnet2.bin.enh_inference import main

from posinv.bin.cli import run

if __name__ == "__main__":
    run(main)
