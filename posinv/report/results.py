"""Results as Markdown: tables of scores over seeds, and where they come from."""

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import posinv
from posinv.errors import InputError
from posinv.files import write_whole

BEGIN = "<!-- posinv:results:begin -->"
END = "<!-- posinv:results:end -->"
ABSENT = "\N{EN DASH}"

ERROR_RATES = {"pr": "Phoneme error rate (PER, %)", "asr": "Word error rate (WER, %)"}
ENHANCEMENT = {"si_sdr": ("SI-SDR (dB)", 1), "stoi": ("STOI", 3), "pesq": ("PESQ", 2)}
PACKAGES = ("torch", "espnet", "transformers", "numpy")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table that reads well as plain text, too.

    Args:
        header: names of the columns; the first column is aligned left, the others right.
        rows: cells, as many in each row as in the header.

    Returns:
        The lines of the table, each ended by a newline.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |\n"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(map(line, (cells[0], rule, *cells[1:])))


def aggregate(values: Sequence[float | None], decimals: int = 1) -> str:
    """One figure, or ``mean ± sample standard deviation`` of several, as a table's cell.

    Args:
        values: a figure for each seed, at least one; None where it could not be had.
        decimals: digits after the point.

    Returns:
        The cell; ``–`` if any value is None.
    """
    if None in values:
        return ABSENT
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def seeds_caption(seeds: Sequence[str]) -> str:
    """What the figures of a table are over: ``seed 1``, or several seeds' mean and deviation."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean ± sample standard deviation over seeds {', '.join(seeds)}"


def read_scores(path: Path, sets: Sequence[str], keys: Sequence[str]) -> list[dict]:
    """Read the scores of some test sets from a ``scores.json``.

    Args:
        path: the file: ``{set: {key: figure or null}}``.
        sets: the sets wanted.
        keys: what each must have.

    Returns:
        The scores of each set, in order.

    Raises:
        InputError: no such file, not such JSON, or a set or key that it lacks.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the scores: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): score again") from error
    for name in sets:
        if not isinstance(scores, dict) or not isinstance(scores.get(name), dict):
            raise InputError(f"{path}: no scores of the set {name}: score it, or correct --sets")
        for key in keys:
            if key not in scores[name]:
                raise InputError(f"{path}: no {key} of the set {name}: score again")
    return [scores[name] for name in sets]


def enhancement_report(
    expdir: Path | str,
    systems: Mapping[str, str],
    sets: Sequence[str],
    se_sets: Sequence[str],
    seeds: Sequence[str],
) -> str:
    """Tables of a speech enhancement recipe: PER and WER of each set, then SE metrics.

    Args:
        expdir: with ``seed<seed>/<system>/superb/{pr,asr}/decode/scores.json`` and
            ``seed<seed>/<system>/enhanced/scores.json``.
        systems: labels of the rows, by system.
        sets: test sets of the error rates.
        se_sets: test sets over which SI-SDR, STOI and PESQ are averaged.
        seeds: random seeds.

    Returns:
        Markdown.

    Raises:
        InputError: a score is missing. PESQ may be null.
    """
    over = seeds_caption(seeds)
    parts = []
    for task, caption in ERROR_RATES.items():
        rows = []
        for system, label in systems.items():
            of_seeds = [
                [row["rate"] for row in read_scores(path, sets, ["rate"])]
                for path in _paths(expdir, seeds, system, f"superb/{task}/decode")
            ]
            rows.append([label, *map(aggregate, zip(*of_seeds, strict=True))])
        parts.append(f"{caption}, {over}:\n\n{markdown_table(['system', *sets], rows)}")

    rows, notes = [], []
    for system, label in systems.items():
        row = [label]
        of_seeds = [
            read_scores(path, se_sets, [*ENHANCEMENT, *map(_failed, ENHANCEMENT), "utterances"])
            for path in _paths(expdir, seeds, system, "enhanced")
        ]
        for metric, (name, decimals) in ENHANCEMENT.items():
            means = [_mean([scores[metric] for scores in of_sets]) for of_sets in of_seeds]
            row.append(aggregate(means, decimals))
            every = [scores for of_sets in of_seeds for scores in of_sets]
            if failed := sum(scores[_failed(metric)] or 0 for scores in every):
                total = sum(scores["utterances"] for scores in every)
                notes.append(f"{name} of {label}: {failed} of {total}")
        rows.append(row)
    header = ["system", *(name for name, _ in ENHANCEMENT.values())]
    table = markdown_table(header, rows)
    parts.append(f"Enhancement, mean of {' and '.join(se_sets)}, {over}:\n\n{table}")
    if notes:
        parts.append(f"Utterances left out, as their score is undefined: {'; '.join(notes)}.\n")
    return "\n".join(parts)


def _paths(expdir: Path | str, seeds: Sequence[str], system: str, scored: str) -> list[Path]:
    return [Path(expdir) / f"seed{seed}" / system / scored / "scores.json" for seed in seeds]


def _failed(metric: str) -> str:
    return f"{metric}_failed"


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def provenance(command: str) -> str:
    """Where results come from: command, date, git state, machine and software, as Markdown."""
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
    # A RESULTS.md is what is being written.
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
    """Return what a command prints; None if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def write_results(path: Path | str, title: str, body: str) -> None:
    """Write results into a Markdown file, and keep what people wrote around them.

    Args:
        path: the file. If it exists, what lies between its two markers,
            ``<!-- posinv:results:begin -->`` and ``<!-- posinv:results:end -->``, is replaced.
        title: heading of a new file.
        body: Markdown.

    Raises:
        InputError: the file exists without that pair of markers.
    """
    path = Path(path)
    block = f"{BEGIN}\n\n{body.strip()}\n\n{END}"
    if not path.exists():
        write_whole(path, f"# {title}\n\n{block}\n")
        return
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise InputError(
            f"{path}: exists, but hasn't one '{BEGIN}' and after it one '{END}', between which "
            "the results go: add the two lines, or name another file"
        )
    write_whole(path, before + block + after)
