"""Results as Markdown: tables, scores over random seeds, and how they were made."""

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import metadata
from pathlib import Path

import posinv
from posinv.data.files import read_yaml, write_atomic
from posinv.errors import InputError

BEGIN = "<!-- posinv:results:begin -->"
END = "<!-- posinv:results:end -->"
ABSENT = "\N{EN DASH}"

ERROR_RATES = {"pr": "Phoneme error rate (PER, %)", "asr": "Word error rate (WER, %)"}
SHORT = {"pr": "PER", "asr": "WER", "qbe": "MTWV"}
# Measures of enhanced speech: the column's name, and digits after the point. More is better.
METRICS = {
    "si_sdr": ("SI-SDR (dB)", 1),
    "stoi": ("STOI", 3),
    "pesq": ("PESQ", 2),
    "dnsmos": ("DNSMOS", 2),
}
QUERY_SEARCH = "Query-by-example search, maximum term weighted value (MTWV, times 100)"
PACKAGES = ("torch", "espnet", "transformers", "numpy")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is also readable as plain text.

    Args:
        header: names of the columns; the first column is aligned left, the others right.
        rows: the cells of each row, as many as there are columns.

    Returns:
        The lines of the table, with a newline after each.
    """
    cells = [[escape(cell, False).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |\n"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(map(line, (cells[0], rule, *cells[1:])))


def aggregate(values: Sequence[float | None], decimals: int = 1) -> str:
    """Return a table's cell: one figure, or several as ``mean ± sample standard deviation``.

    Args:
        values: a figure for each random seed, at least one; None where there is no figure.
        decimals: digits after the point.

    Returns:
        The cell; ``–`` if any value is None.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ABSENT
    mean = f"{statistics.fmean(known):.{decimals}f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(known):.{decimals}f}"


def seeds_caption(seeds: Sequence[str]) -> str:
    """Return the part of a table's caption that says which random seeds its figures are from."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean ± sample standard deviation over seeds {', '.join(seeds)}"


def read_scores(
    path: Path, sets: Sequence[str] | None, keys: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Read the scores of test sets from a ``scores.json``.

    Args:
        path: the file, ``{set: {key: figure or null}}``.
        sets: the sets to return; None: all that the file has.
        keys: keys that each of these sets must have.

    Returns:
        The scores of each set, in the order of ``sets``.

    Raises:
        InputError: no such file, not such JSON, or a set or key is missing.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the scores: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): score again") from error
    if not isinstance(scores, dict):
        raise InputError(f"{path}: not scores by test set: score again")
    sets = list(scores) if sets is None else sets
    for name in sets:
        if not isinstance(scores.get(name), dict):
            raise InputError(f"{path}: no scores of the set {name}: score it, or correct --sets")
        for key in keys:
            if key not in scores[name]:
                raise InputError(f"{path}: no {key} of the set {name}: score again")
    return {name: scores[name] for name in sets}


@dataclass(frozen=True)
class Published:
    """Figures that others have published, for tables that compare them with ours.

    Attributes:
        figures: (figure, source) for each (system, task, test set); a task is ``pr``, ``asr`` or
            ``qbe``.
    """

    figures: Mapping[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "Published":
        """Read a YAML list of ``{system, task, set, figure, source}``; None: nothing published.

        Raises:
            InputError: no such file, not YAML, or not such a list.
        """
        entries = read_yaml(path, "--published") if path else []
        wanted = {"system", "task", "set", "figure", "source"}
        figures = {}
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict) or entry.keys() != wanted or entry["task"] not in SHORT:
                raise InputError(
                    f"--published {path}: {entry}: each entry must have system, task (pr, asr or "
                    "qbe), set, figure and source"
                )
            key = str(entry["system"]), entry["task"], str(entry["set"])
            figures[key] = str(entry["figure"]), str(entry["source"])
        return cls(figures)

    def beside[T](
        self,
        cells: Sequence[T],
        task: str,
        sets: Sequence[str],
        system: str | None = None,
        make: Callable[[str], T] = str,  # type: ignore[assignment]  # T is str then
    ) -> list[T]:
        """Insert the cells of the published figures into a row of a table.

        A test set for which any system has a published figure gets a column for such figures,
        after the column of our own.

        Args:
            cells: our cells, one for each test set.
            task: ``pr``, ``asr`` or ``qbe``.
            sets: test sets.
            system: the system of the row; None: the row is the table's header.
            make: makes a cell of a text.

        Returns:
            The row with the new cells, which are empty where this system has no published figure.
        """
        row = []
        for cell, name in zip(cells, sets, strict=True):
            row.append(cell)
            if any(key[1:] == (task, name) for key in self.figures):
                if system is None:
                    row.append(make("published"))
                else:
                    figure, _ = self.figures.get((system, task, name), ("", ""))
                    row.append(make(figure))
        return row

    def sources(self) -> str:
        """Return a paragraph with each figure and its source; empty if there are none."""
        named = [
            f"{system}, {SHORT[task]} {name}: {figure} ({source})"
            for (system, task, name), (figure, source) in self.figures.items()
        ]
        return f"Published: {'; '.join(named)}." if named else ""


NONE_PUBLISHED = Published()


def provenance(command: str) -> str:
    """Return how results were made: command, date, git commit, machine, versions, as Markdown."""
    versions = [f"Python {platform.python_version()}", f"posinv {posinv.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"- command: `{command}`\n"
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
        f"- git commit: {_git_state(Path(posinv.__file__).parent)}\n"
        f"- machine: {_machine()}\n"
        f"- software: {', '.join(versions)}\n"
    )


def _git_state(directory: Path) -> str:
    commit = _output("git", "-C", str(directory), "rev-parse", "--verify", "HEAD")
    if commit is None:
        return "unknown (not a git checkout with a commit)"
    # Recipes write their results into RESULTS.md, so a change there doesn't count.
    others = (":/", ":(exclude,top,glob)**/RESULTS.md")
    changes = _output("git", "-C", str(directory), "status", "--porcelain", "--", *others)
    return f"{commit} with uncommitted changes" if changes else commit


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    gpu = ", ".join(gpus.splitlines()) if gpus else "no GPU"
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {gpu}"


def _output(*command: str) -> str | None:
    """Return a command's output; None if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def write_results(path: Path | str, title: str, body: str) -> None:
    """Write results into a Markdown file, and keep the text around them.

    Args:
        path: the file. If it exists, the text between its markers
            ``<!-- posinv:results:begin -->`` and ``<!-- posinv:results:end -->`` is replaced.
        title: heading of a new file.
        body: the results, as Markdown.

    Raises:
        InputError: the file exists and doesn't have these two markers, once each.
    """
    path = Path(path)
    block = f"{BEGIN}\n\n{body.strip()}\n\n{END}"
    if not path.exists():
        write_atomic(path, f"# {title}\n\n{block}\n")
        return
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise InputError(
            f"{path}: exists, but hasn't one '{BEGIN}' and after it one '{END}', between which "
            "the results go: add the two lines, or name another file"
        )
    write_atomic(path, before + block + after)
