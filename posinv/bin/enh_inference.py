"""ESPnet's ``enh_inference`` with posinv's classes registered."""

from espnet2.bin import enh_inference

import posinv.espnet  # noqa: F401  (registers)
from posinv.bin.cli import run
from posinv.data.device import pick_device
from posinv.espnet.tasks.checked import telling_causes


def main() -> None:
    """Decode; the options are ESPnet's (``--help``)."""
    args = enh_inference.get_parser().parse_args()
    pick_device(args.ngpu)
    with telling_causes(args.output_dir):
        enh_inference.main()


if __name__ == "__main__":
    run(main)
