import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_ssl import TINY_SSL

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "egs" / "TEMPLATE" / "scripts"
# What makes the recipes' own configurations so small that nothing is learned.
HEAD = {
    "preencoder_conf": {"input_size": 32, "output_size": 16},
    "encoder_conf": {"hidden_size": 16},
    "scheduler_conf": {"warmup_steps": 1, "total_steps": 3},
    "num_iters_per_epoch": 3,
}
SEPARATOR = {"separator_conf": {"hidden": 4, "depth": 2}}
TOY = {
    "ssl": {"ssl_conf": TINY_SSL},
    "enh": SEPARATOR,
    "finetune": {"num_iters_per_epoch": 3},
    "ssft": {
        "model_conf": {"projection_size": 16},
        "scheduler_conf": {"total_steps": 3},
        "num_iters_per_epoch": 3,
    },
    "pr": HEAD,
    "asr": HEAD,
}


def shrink(path: Path, changes: dict) -> None:
    """Change a training configuration, mappings key by key, and cut it to one epoch."""
    config = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    config.update(max_epoch=1, num_workers=0)
    path.write_text(yaml.safe_dump(config))


class Recipe:
    """A copy of the recipes, so that a test writes nothing into the checkout."""

    def __init__(self, top: Path, name: str) -> None:
        self.dir = top / "egs" / name

    def run(self, *options: object, script: str = "run.sh") -> subprocess.CompletedProcess:
        # run.sh is called from elsewhere, as README does; the other scripts in the recipe.
        return subprocess.run(
            [self.dir / script, *map(str, options)],
            cwd="/" if script == "run.sh" else self.dir,
            text=True,
            capture_output=True,
        )

    def check_stages(self, output: str, last: int) -> None:
        """Check that a whole run told each stage's beginning, and its end with the time."""
        for number in range(1, last + 1):
            stage = rf"^[\d:]+ stage {number}: "
            assert len(re.findall(rf"{stage}(?!done|kept)", output, re.M)) == 1
            assert len(re.findall(rf"{stage}done in \d+ s$", output, re.M)) == 1

    def table(self, output: str, results: str = "exp/RESULTS.md") -> list[str]:
        """Return the rows of the results, which must be on the terminal, too, with their origin."""
        assert f" the table: {self.dir / results}\n" in output
        assert not (self.dir / "RESULTS.md").exists()
        [report] = re.findall(r" the report: (.+)\n", output)
        assert "<h2>Differences</h2>" in Path(report).read_text()
        text = (self.dir / results).read_text()
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert all(row in output for row in rows)
        name = f"egs/{self.dir.parent.name}/{self.dir.name}/run.sh"
        for fact in (name, "espnet", "torch", "commit"):
            assert fact in text
        return rows


@pytest.fixture(autouse=True, scope="session")
def recipes_use_the_fork_server(fork_server, ctrl_c):
    """Let all recipes of the session share one fork server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSINV_FORK_SERVER", str(fork_server))
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The parts of the checkout that recipes need, under a path with spaces."""
    top = tmp_path_factory.mktemp("a path") / "with spaces"
    ignored = shutil.ignore_patterns("data", "dump", "exp", "downloads", "RESULTS*.md")
    shutil.copytree(ROOT / "egs", top / "egs", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "conf", top / "conf", symlinks=True)
    for name in ("posinv", "tools", "setup.cfg"):
        (top / name).symlink_to(ROOT / name)
    for name, changes in TOY.items():
        shrink(top / "conf" / "small" / f"{name}.yaml", changes)
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
