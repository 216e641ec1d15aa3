"""Fine-tune an SSL model without labels (LASER), as an ESPnet training command."""

from posinv.bin.cli import run
from posinv.espnet.tasks.ssft import SSFTTask


def main() -> None:
    """Train; the options are ESPnet's (``--help``)."""
    SSFTTask.main()


if __name__ == "__main__":
    run(main)
