"""Copies of the recipes whose configurations are so small that nothing is learned."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from tiny_ssl import TINY_SSL

ROOT = Path(__file__).resolve().parents[1]
_DATA = (
    *("--local_data_opts", "--minutes 0.4 --dev_minutes 0.1 --test_minutes 0.1"),
    *("--token_sets", "train dev test", "--ssl_units", "10"),
)
# The options of a short run of egs/mini.
MINI = {
    "enh1": (*_DATA, "--criteria", "ssl_mse", "--test_conditions", "clean seen"),
    "ssft1": (*_DATA, "--methods", "mse"),
}


def toy(updates: int) -> dict[str, dict[str, Any]]:
    """Return what changes in conf/small for trainings of so many updates (3 in an epoch)."""
    short = {
        "scheduler_conf": {"warmup_steps": 1, "total_steps": updates},
        "num_iters_per_epoch": 3,
    }
    head = {
        "preencoder_conf": {"input_size": 32, "output_size": 16},
        "encoder_conf": {"hidden_size": 16},
        **short,
    }
    return {
        "ssl": {"ssl_conf": TINY_SSL, **short},
        "enh": {"separator_conf": {"hidden": 4, "depth": 2}, **short},
        "finetune": {"num_iters_per_epoch": 3},
        "ssft": {
            "model_conf": {"projection_size": 16},
            "scheduler_conf": {"total_steps": updates},
            "num_iters_per_epoch": 3,
        },
        "pr": head,
        "asr": head,
    }


def shrink(path: Path, changes: dict[str, Any], max_epoch: int = 1) -> None:
    """Change a training configuration, mappings key by key, and cut it to a few epochs."""
    config = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    config.update(max_epoch=max_epoch, num_workers=0)
    path.write_text(yaml.safe_dump(config))


def copy_recipes(top: Path, max_epoch: int = 1) -> None:
    """Copy the parts of the checkout that recipes need, so that it is not written into."""
    ignored = shutil.ignore_patterns("data", "dump", "exp", "downloads", "RESULTS*.md")
    shutil.copytree(ROOT / "egs", top / "egs", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "conf", top / "conf", symlinks=True)
    for name in ("posinv", "tools", "setup.cfg"):
        (top / name).symlink_to(ROOT / name)
    for name, changes in toy(3 * max_epoch).items():
        shrink(top / "conf" / "small" / f"{name}.yaml", changes, max_epoch)


class Recipe:
    """A recipe by name, such as ``mini/enh1``, in a copy."""

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
