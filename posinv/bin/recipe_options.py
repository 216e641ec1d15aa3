"""Print a YAML file of recipe options for the shell: name and value in turn, each ended by NUL."""

import sys
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.files import read_yaml
from posinv.errors import InputError


def read_options(path: Path) -> dict[str, str]:
    """Read ``name: value`` pairs as the shell takes them; lists are joined by spaces.

    Raises:
        InputError: no such file, not YAML, or not a flat mapping.
    """
    options = read_yaml(path, "--config")
    if not isinstance(options, dict):
        raise InputError(f"--config {path}: must be a mapping of option names to values")
    texts = {str(name): _as_shell(path, name, value) for name, value in options.items()}
    for name, text in texts.items():
        if "\0" in name + text:  # it would end the name or value
            raise InputError(f"--config {path}: {name!a}: a null character: remove it")
    return texts


def _as_shell(path: Path, name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(_as_shell(path, name, item) for item in value)
    if isinstance(value, dict):
        raise InputError(f"--config {path}: {name}: must be a value or a list, not a mapping")
    return "" if value is None else str(value)


def main() -> None:
    """Print the options of the file given."""
    parser = command_parser(__doc__)
    parser.add_argument("config", type=Path, help="YAML file of recipe options")
    for pair in read_options(parser.parse_args().config).items():
        for text in pair:
            sys.stdout.write(text + "\0")


if __name__ == "__main__":
    run(main)
