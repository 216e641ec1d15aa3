"""Pretrain a small HuBERT on k-means units, as an ESPnet training command."""

from posinv.bin.cli import run
from posinv.espnet.tasks.pretrain import PretrainTask


def main() -> None:
    """Train; the options are ESPnet's (``--help``)."""
    PretrainTask.main()


if __name__ == "__main__":
    run(main)
