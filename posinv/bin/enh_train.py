"""ESPnet's ``enh_train`` with posinv's classes registered."""

from posinv.bin.cli import run
from posinv.espnet.tasks.enh import EnhancementTask


def main() -> None:
    """Train; the options are ESPnet's (``--help``)."""
    EnhancementTask.main()


if __name__ == "__main__":
    run(main)
