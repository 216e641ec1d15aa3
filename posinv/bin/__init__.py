"""One thin command-line module per command: ``python -m posinv.bin.<command>``."""
