"""The console scripts: ``posinv-enhance`` runs ``posinv.bin.enhance``, and so on."""

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Run the command that the script is named for."""
    script = Path(sys.argv[0]).name
    command = script.removeprefix("posinv-").replace("-", "_")
    try:
        run = importlib.import_module("posinv.bin.cli").run
        module = importlib.import_module(f"posinv.bin.{command}")
    except ModuleNotFoundError as error:
        sys.exit(
            f"{script}: error: the package {error.name} is not installed: "
            "pip install 'posinv[espnet]'"
        )
    run(module.main)
