"""What a recipe's experiment holds: systems, seeds, test sets, scores, transcripts, audio."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from posinv.data.tables import read_table, read_tsv
from posinv.errors import InputError
from posinv.report.results import METRICS
from posinv.scoring.text import UTTERANCE_COLUMNS

LABELS = {"noisy": "noisy input", "enh": "before fine-tuning"}
# The order of rows and columns; names that are not here follow, in alphabetical order.
SYSTEMS = (
    *("noisy", "enh", "ssl_mse", "ssl_mse_pad", "ssl_softdtw", "ssl_xcorr"),
    *("base", "soft_dtw", "mse", "laser", "nrssft"),
)
CONDITIONS = ("clean", "noisy", "seen", "unseen", "shift", "rate")
# What shows that a folder seed<seed>/<system> is a system's: its training, or a result.
RESULTS = ("config.yaml", "enhanced", "superb", "qbe", "collapse.json")


@dataclass(frozen=True)
class Utterance:
    """A decoded test utterance: its errors, and what was said and heard."""

    name: str
    errors: int
    ref_tokens: int
    ref: str
    hyp: str


@dataclass(frozen=True)
class Experiment:
    """The folder that a recipe leaves, ``--expdir``.

    Attributes:
        path: the folder.
        systems: the systems, in a table's order.
        seeds: random seeds.
    """

    path: Path
    systems: tuple[str, ...]
    seeds: tuple[str, ...]
    _scored: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(
        cls,
        path: Path | str,
        systems: Sequence[str] | None = None,
        seeds: Sequence[str] | None = None,
    ) -> "Experiment":
        """Find the systems and seeds of an experiment, unless they are given.

        Raises:
            InputError: no such folder.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder: name the --expdir of a recipe")
        if seeds is None:
            found = [child.name.removeprefix("seed") for child in path.glob("seed*")]
            seeds = sorted(filter(str.isdecimal, found), key=int)
        if systems is None:
            folders = [child for seed in seeds for child in (path / f"seed{seed}").glob("*/")]
            names = {
                folder.name
                for folder in folders
                if any((folder / result).exists() for result in RESULTS)
            }
            systems = sorted(names, key=lambda name: (_rank(name, SYSTEMS), name))
        return cls(path, tuple(systems), tuple(seeds))

    @property
    def tunes_enhancement(self) -> bool:
        """Whether the recipe is ``enh1``, which fine-tunes enhancement models."""
        return "base" not in self.systems and bool({"noisy", "enh"} & {*self.systems})

    @property
    def labels(self) -> dict[str, str]:
        """The row's label for each system."""
        return {system: LABELS.get(system, system) for system in self.systems}

    def folder(self, seed: str, system: str) -> Path:
        """The folder of a system's models and results."""
        return self.path / f"seed{seed}" / system

    def training(self, seed: str, system: str) -> Path | None:
        """The directory of the training that made a system; None if it has none."""
        folder = self.path / "enh" if system == "enh" else self.folder(seed, system)
        return folder if (folder / "config.yaml").is_file() else None

    def head(self, seed: str, system: str, task: str) -> Path:
        """The training directory of a system's best head of ``pr`` or ``asr``."""
        return self.folder(seed, system) / "superb" / task / "best"

    def decoded(self, seed: str, system: str, task: str) -> Path:
        """The folder with the scores of the test sets that a head decoded."""
        return self.head(seed, system, task) / "decode"

    def enhanced(self, seed: str, system: str) -> Path:
        """The scores of a system's enhanced speech."""
        return self.folder(seed, system) / "enhanced" / "scores.json"

    @cached_property
    def sets(self) -> list[str]:
        """The test sets for which there is an error rate."""
        return self._sets("superb/*/best/decode/scores.json")

    @cached_property
    def enh_sets(self) -> list[str]:
        """The test sets over which the scores of enhancement are averaged: the noisy ones."""
        found = self._sets("enhanced/scores.json")
        noisy = [name for name in found if name.endswith(("_seen", "_unseen", "_noisy"))]
        return noisy or found

    @cached_property
    def qbe_sets(self) -> list[str]:
        """The test sets in which spoken words were searched."""
        return self._sets("qbe/scores.json")

    def _sets(self, pattern: str) -> list[str]:
        names: dict[str, None] = {}
        for seed in self.seeds:
            for system in self.systems:
                for path in self.folder(seed, system).glob(pattern):
                    scores = json.loads(path.read_text(encoding="utf-8"))
                    names.update(dict.fromkeys(scores))
        return sorted(names, key=lambda name: (_rank(name.split("_")[-1], CONDITIONS), name))

    def utterances(self, seed: str, system: str, task: str) -> dict[str, list[Utterance]]:
        """Return each test set's utterances; empty where they have not been scored one by one.

        Raises:
            InputError: ``scores.tsv`` is damaged.
        """
        path = self.decoded(seed, system, task) / "scores.tsv"
        if path not in self._scored:
            found: dict[str, list[Utterance]] = {}
            for row in read_tsv(path, UTTERANCE_COLUMNS) if path.is_file() else ():
                utterance = Utterance(
                    row["utterance"],
                    int(row["errors"]),
                    int(row["ref_tokens"]),
                    row["ref"],
                    row["hyp"],
                )
                found.setdefault(row["set"], []).append(utterance)
            self._scored[path] = found
        return self._scored[path]

    def measures(self, seed: str, system: str) -> dict[str, dict[str, dict[str, float]]]:
        """Return the measures of enhanced speech by test set, utterance and metric.

        A metric that was not computed, or is undefined for an utterance, is left out; without
        scores of the utterances, all is empty.

        Raises:
            InputError: ``scores.tsv`` is damaged.
        """
        path = self.enhanced(seed, system).with_suffix(".tsv")
        if path not in self._scored:
            found: dict[str, dict[str, dict[str, float]]] = {}
            for row in read_tsv(path, ("utterance", "set")) if path.is_file() else ():
                values = {metric: float(row[metric]) for metric in METRICS if row.get(metric)}
                found.setdefault(row["set"], {})[row["utterance"]] = {
                    metric: value for metric, value in values.items() if math.isfinite(value)
                }
            self._scored[path] = found
        return self._scored[path]

    @cached_property
    def test_data(self) -> Path | None:
        """The formatted test sets, ``dump/raw/test_all``; None if they are not there."""
        for pattern in ("superb/*/best/decode/scores.json.inputs", "enhanced/scores.json.inputs"):
            for path in sorted(self.path.glob(f"seed*/*/{pattern}")):
                inputs = re.findall(r"^#   \d+ \d+ (.+)$", path.read_text(), re.MULTILINE)
                if inputs and (folder := self.find(Path(inputs[0]).parent)) is not None:
                    return folder
        return None

    def find(self, path: Path | str) -> Path | None:
        """Return a path as the recipe wrote it, from here; None if there is nothing.

        A recipe's paths start at its own folder, which is the one above ``exp``, or else the one
        that the records of its trainings name: it may have been moved since.
        """
        for base in self._recipe:
            if Path(path).is_relative_to(base):
                path = Path(path).relative_to(base)
        for base in (self.path.resolve().parent, *self._recipe):
            if (found := base / path).exists():
                return found
        return None

    @cached_property
    def _recipe(self) -> list[Path]:
        for record in sorted(self.path.glob("**/run.sh")):
            if match := re.search(r"^# What made .*; run in (.+), after", record.read_text(), re.M):
                return [Path(match[1])]
        return []

    def speakers(self, name: str) -> dict[str, str]:
        """The speaker of each utterance of a test set; empty if that is not known any more."""
        if self.test_data is None:
            return {}
        path = self.test_data.parent / name / "utt2spk"
        return read_table(path) if path.is_file() else {}


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)
