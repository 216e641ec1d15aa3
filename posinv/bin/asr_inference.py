"""ESPnet's ``asr_inference`` with posinv's classes registered."""

from espnet2.bin import asr_inference

import posinv.espnet  # noqa: F401  (registers)
from posinv.bin.cli import run
from posinv.data.device import pick_device


def main() -> None:
    """Decode; the options are ESPnet's (``--help``)."""
    pick_device(asr_inference.get_parser().parse_args().ngpu)
    asr_inference.main()


if __name__ == "__main__":
    run(main)
