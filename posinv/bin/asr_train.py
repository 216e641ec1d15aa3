"""ESPnet's ``asr_train`` with posinv's classes registered."""

from posinv.bin.cli import run
from posinv.espnet.tasks.asr import ASRTask


def main() -> None:
    """Train; the options are ESPnet's (``--help``)."""
    ASRTask.main()


if __name__ == "__main__":
    run(main)
