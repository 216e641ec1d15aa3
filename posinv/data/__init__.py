"""Audio, data directories, tables, files and checkpoints; work in parallel."""
