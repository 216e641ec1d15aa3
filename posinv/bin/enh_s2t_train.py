"""ESPnet's ``enh_s2t_train`` with posinv's classes registered."""

from posinv.bin.cli import run
from posinv.espnet.tasks.enh_s2t import EnhS2TTask


def main() -> None:
    """Train; the options are ESPnet's (``--help``)."""
    EnhS2TTask.main()


if __name__ == "__main__":
    run(main)
