import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def quick_bench(python):
    """Run a benchmark of tools/ with --quick, by its name and options."""

    def run(name, *options):
        command = [*python, "-m", name, "--quick", *map(str, options)]
        return subprocess.run(command, cwd=TOOLS, capture_output=True, text=True)

    return run
