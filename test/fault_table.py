"""The table of what ``--faults`` tried: tools/results/faults.md, and in short in egs/README.md."""

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from posinv.report.results import markdown_table, write_results

ROOT = Path(__file__).resolve().parents[1]
# The files of test/faults, and the outcome of their tests, unless a test reports another.
AREAS = {
    "test_kills": ("Kills", "went on; results identical"),
    "test_disk": ("Disk", "one line; nothing cut short"),
    "test_two_at_once": ("Two at once", "the second refuses and names the first"),
    "test_damaged_corpora": ("Damaged corpora", "as egs/README.md says"),
    "test_parsers": ("Parsers", "an InputError or a right answer"),
    "test_numbers": ("Numbers", "finite, or refused by name"),
    "test_untrusted": ("Untrusted input", "refused"),
    "test_environment": ("Environment", "works, or one line"),
    "test_long_runs": ("Long runs", "flat"),
}


def write_fault_table(
    passed: Iterable[pytest.TestReport], failed: Iterable[pytest.TestReport]
) -> None:
    """Write both tables, if tests of every file ran.

    Args:
        passed: reports of the tests in test/faults that passed; ``tried`` among the properties of
            one is (what, outcome, times).
        failed: of those that failed.
    """
    rows: dict[tuple[str, str, str], int] = Counter()
    failures: dict[str, list[str]] = defaultdict(list)
    for report in passed:
        area, outcome = AREAS[Path(report.nodeid.partition("::")[0]).stem]
        tried = [value for name, value in report.user_properties if name == "tried"]
        for what, came, times in tried or [("checks", outcome, 1)]:
            rows[area, what, came] += times
    for report in failed:
        area, _ = AREAS[Path(report.nodeid.partition("::")[0]).stem]
        failures[area].append(report.nodeid.partition("::")[2])
        rows[area, report.nodeid.partition("::")[2], "FAILED"] += 1
    order = [area for area, _ in AREAS.values()]
    tested = {area for area, _, _ in rows}
    missing = [name for name, (area, _) in AREAS.items() if area not in tested]
    if missing:
        print(f"\nThe table of faults stays as it was: {', '.join(missing)} did not run")
        return
    table = [
        [area, what, f"{times:,}", came]
        for (area, what, came), times in sorted(rows.items(), key=lambda x: order.index(x[0][0]))
    ]
    cpus = len(os.sched_getaffinity(0))
    origin = (
        f"Written by `test/run.sh --faults` on {datetime.now(UTC):%Y-%m-%d}, on "
        f"{platform.system()} {platform.release()} with {cpus} CPUs, Python "
        f"{platform.python_version()}, torch {torch.__version__}."
    )
    header = ["", "what was tried", "times", "what happened"]
    block = f"{origin}\n\n{markdown_table(header, table)}"
    write_results(ROOT / "tools" / "results" / "faults.md", "What was broken on purpose", block)
    short = []
    for name, (area, outcome) in AREAS.items():
        times = sum(count for (where, _, _), count in rows.items() if where == area)
        came = f"FAILED: {', '.join(failures[area])}" if failures[area] else outcome
        if times:
            short.append([f"[{area}](../test/faults/{name}.py)", f"{times:,}", came])
    body = markdown_table(["", "times", "what happened"], short)
    write_results(ROOT / "egs" / "README.md", "", body)
