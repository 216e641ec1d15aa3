import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from toy_recipes import Recipe, copy_recipes, shrink

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "egs" / "TEMPLATE" / "scripts"


@pytest.fixture(autouse=True, scope="session")
def recipes_use_the_fork_server(fork_server, signals):
    """Let all recipes of the session share one fork server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSINV_FORK_SERVER", str(fork_server))
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The parts of the checkout that recipes need, under a path with spaces."""
    top = tmp_path_factory.mktemp("a path") / "with spaces"
    copy_recipes(top)
    return top


@pytest.fixture(scope="module")
def recipe(checkout):
    """A recipe by name, such as ``mini/enh1``."""
    return lambda name: Recipe(checkout, name)


@pytest.fixture(scope="module")
def shrink_config():
    """The function that makes a configuration small."""
    return shrink


@pytest.fixture
def bash(tmp_path):
    """Run a script in a folder with a space in its name; $scripts are the recipes' scripts."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "path.sh").write_text(
        f"export PATH='{Path(sys.executable).parent}':$PATH PYTHONPATH='{ROOT}'\n"
    )

    numbers = itertools.count()

    def command(script, *args):
        path = tmp_path / str(next(numbers)) / "recipe"
        path.parent.mkdir()
        path.write_text(f"set -euo pipefail\nscripts='{SCRIPTS}'\n{script}")
        return ["bash", str(path), *map(str, args)]

    def run(script, *args):
        return subprocess.run(command(script, *args), cwd=folder, text=True, capture_output=True)

    run.command, run.folder = command, folder
    return run
