"""Break the package in many places, one at a time in a copy, and see that the tests notice.

    python tools/mutation_check.py                 # 40 places drawn by --seed, then the guards
    python tools/mutation_check.py --seconds 400   # a piece of that; run again, it goes on

An operator, a constant, a condition or a statement is changed in the losses, the exact batches,
the checks of input, the mixing of noise and what resumes; the test files that TESTS names for it
run, and should fail. GUARDS are the places that keep files from elsewhere from doing harm: each is
taken out, and its test should fail. A state file keeps what is done. The table goes to standard
output.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 240  # seconds; tests that don't end have noticed

PARSERS = "test/faults/test_parsers.py"
ALIASES = f"{PARSERS}::test_aliases_that_double_are_refused"
DAMAGED = "test/faults/test_damaged_corpora.py"
BABBLE = "test_babble_is_not_made_of_what_is_left_out"
NUMBERS = "test/faults/test_numbers.py"
UNTRUSTED = "test/faults/test_untrusted.py"

# For each module, the light test files that should notice.
TESTS = {
    "losses/functional.py": ("test/posinv/losses/test_functional.py",),
    "lengths.py": ("test/posinv/test_lengths.py", "test/posinv/softdtw/test_loss.py"),
    "softdtw/band.py": ("test/posinv/softdtw/test_band.py",),
    "softdtw/distance.py": (
        "test/posinv/softdtw/test_loss.py",
        "test/posinv/softdtw/test_band.py",
    ),
    "softdtw/loss.py": ("test/posinv/softdtw/test_loss.py",),
    "ssl/exact.py": ("test/posinv/ssl/test_exact.py",),
    "ssl/upstream.py": ("test/posinv/ssl/test_upstream.py", "test/posinv/ssl/test_exact.py"),
    "augment/speed.py": ("test/posinv/augment/test_augment.py",),
    "augment/pad.py": ("test/posinv/augment/test_augment.py",),
    "data/audio.py": (
        "test/posinv/data/test_audio.py",
        "test/posinv/corpora/test_imported.py::test_a_channel_of_stereo_recordings",
        DAMAGED,
    ),
    "data/tables.py": (
        "test/posinv/data/test_tables.py",
        f"{PARSERS}::test_tables",
        "test/posinv/data/test_directory.py",
    ),
    "data/directory.py": ("test/posinv/data/test_directory.py", DAMAGED),
    "data/files.py": ("test/posinv/data/test_files.py", f"{PARSERS}::test_any_yaml", ALIASES),
    "corpora/imported.py": (
        "test/posinv/corpora/test_imported.py",
        f"{PARSERS}::test_segments",
        f"{PARSERS}::test_channels",
    ),
    "corpora/lexicon.py": ("test/posinv/corpora/test_lexicon.py", f"{PARSERS}::test_lexicons"),
    "corpora/noisy.py": ("test/posinv/corpora/test_noisy.py", f"{DAMAGED}::{BABBLE}"),
    "corpora/download.py": ("test/posinv/corpora/test_download.py",),
    "models/nonfinite.py": (f"{NUMBERS}::test_the_first_module_is_named",),
    "scoring/text.py": ("test/posinv/scoring/test_text.py",),
}

# File, what stands there, what takes its place, the test that should fail.
GUARDS = (
    (
        "posinv/data/checkpoint.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        f"{UNTRUSTED}::test_checkpoints",
    ),
    (
        "posinv/data/units.py",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        f"{UNTRUSTED}::test_k_means_files",
    ),
    (
        "posinv/ssl/load.py",
        "(name, trust_remote_code=False)",
        "(name, trust_remote_code=True)",
        f"{UNTRUSTED}::test_models_with_code_of_their_own",
    ),
    (
        "posinv/ssl/load.py",
        "weights_only=True,",
        "weights_only=False,",
        f"{UNTRUSTED}::test_weights_of_an_ssl_model",
    ),
    ("posinv/data/files.py", "yaml.safe_load", "yaml.unsafe_load", f"{UNTRUSTED}::test_yaml_tags"),
    (
        "posinv/data/files.py",
        "if _values(value) > YAML_VALUES:",
        "if False:",
        ALIASES,
    ),
    (
        "posinv/data/audio.py",
        "    if pipes:\n",
        "    if False:\n",
        f"{DAMAGED}::test_commands_are_for_lists_of_ones_own",
    ),
    (
        "posinv/corpora/imported.py",
        'if source.type == "command"',
        'if source.type == "none"',
        f"{UNTRUSTED}::test_cuts_with_commands_or_addresses",
    ),
    (
        "posinv/corpora/imported.py",
        '("file", "command", "memory")',
        '("file", "command", "memory", "url")',
        f"{UNTRUSTED}::test_cuts_with_commands_or_addresses",
    ),
    (
        "posinv/inference/enhancer.py",
        "if utterance is None and not is_file(source):",
        "if False:",
        f"{UNTRUSTED}::test_file_names_that_read_as_commands",
    ),
    (
        "posinv/data/audio.py",
        'if "|" in (str(archive).strip()[0], str(archive).strip()[-1]):',
        "if False:",
        f"{UNTRUSTED}::test_file_names_that_read_as_commands",
    ),
    (
        "posinv/corpora/download.py",
        "if held > max(MIN_BOMB, MAX_RATIO * size):",
        "if False:",
        f"{UNTRUSTED}::test_bombs",
    ),
    (
        "posinv/corpora/download.py",
        'if url.startswith("http:") and not _is_local(url):',
        "if False:",
        f"{UNTRUSTED}::test_downloads_are_encrypted",
    ),
    (
        "posinv/corpora/download.py",
        "elif checksum is None and not _is_local(url):",
        "elif False:",
        f"{UNTRUSTED}::test_downloads_have_checksums",
    ),
    (
        "posinv/corpora/download.py",
        "        _require_safe(newurl)\n",
        "",
        f"{UNTRUSTED}::test_servers_cannot_lead_to_where_one_would_not_go",
    ),
    (
        "posinv/corpora/download.py",
        'if path.is_absolute() or ".." in path.parts:',
        "if False:",
        "test/posinv/corpora/test_download.py::test_paths_that_lead_out_are_refused",
    ),
    (
        "posinv/corpora/download.py",
        "tarfile.data_filter(",
        "tarfile.fully_trusted_filter(",
        "test/posinv/corpora/test_download.py::test_links_that_lead_out_are_refused",
    ),
    (
        "posinv/report/results.py",
        "escape(cell, False)",
        "cell",
        f"{UNTRUSTED}::test_markup_in_names_is_shown_as_it_is",
    ),
    (
        "posinv/bin/recipe_options.py",
        'if "\\0" in name + text:',
        "if False:",
        f"{UNTRUSTED}::test_a_configuration_that_sets_what_it_should_not",
    ),
    (
        "egs/TEMPLATE/scripts/options.sh",
        '[ "$_key" != python ] ||',
        "true ||",
        f"{UNTRUSTED}::test_a_configuration_that_sets_what_it_should_not",
    ),
    (
        "posinv/data/tables.py",
        "if control := CONTROL.search(line):",
        "if control := None:",
        f"{DAMAGED}::test_a_damaged_list_is_refused_though_utterances_may_be_skipped",
    ),
    (
        "posinv/inference/hub.py",
        'text.replace(get_token() or "\\0", "<token>")',
        "text",
        "test/posinv/inference/test_hub.py",
    ),
)

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A change of a file: the characters from ``start`` to ``stop`` become ``new``."""

    file: str
    start: int
    stop: int
    line: int
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} `{_short(self.old)}` -> `{_short(self.new) or 'nothing'}`"


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) < 60 else f"{text[:57]}..."


class _Finder(ast.NodeVisitor):
    """Collects (node, replacement) of a module's source."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str]] = []

    def visit_Raise(self, node: ast.Raise) -> None:
        self.found.append((node, "pass"))  # what is in the message changes nothing

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # not the annotations; a decorator or a default is rarely what a test means
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        text = ast.unparse(node)
        if not text.startswith("logging."):
            self.found.append((node, "pass"))
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            changed = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
            self.found.append((node, f"({ast.unparse(changed)})"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = isinstance(node.left, ast.JoinedStr | ast.Constant) and isinstance(
            getattr(node.left, "value", ""), str
        )
        if type(node.op) in OPERATORS and not text:
            changed = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
            self.found.append((node, f"({ast.unparse(changed)})"))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.found.append((node, f"({ast.unparse(ast.BoolOp(other, node.values))})"))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self.found.append((node, f"({ast.unparse(node.operand)})"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.found.append((node, str(not node.value)))
        elif isinstance(node.value, int):
            self.found.append((node, str(node.value + 1)))
        elif isinstance(node.value, float):
            self.found.append((node, repr(2 * node.value + 1)))


def mutations_of(module: str, tests: tuple[str, ...]) -> Iterator[Mutation]:
    """Yield the changes that can be made in a module of the package."""
    path = ROOT / "posinv" / module
    source = path.read_text(encoding="utf-8")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    finder = _Finder()
    finder.visit(ast.parse(source))

    def place(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    for node, new in finder.found:
        start = place(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        stop = place(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        file = f"posinv/{module}"
        yield Mutation(file, start, stop, node.lineno, source[start:stop], new, tests)  # type: ignore[attr-defined]


def draw(places: int, seed: int) -> list[Mutation]:
    """Draw places: a module, then a change in it, none twice."""
    rng = random.Random(seed)
    left = {module: list(mutations_of(module, tests)) for module, tests in TESTS.items()}
    drawn = []
    while len(drawn) < places:
        module = rng.choice(list(left))
        if left[module]:
            drawn.append(left[module].pop(rng.randrange(len(left[module]))))
    return drawn


def guards() -> list[Mutation]:
    """Return the guards, as changes that take them out."""
    found = []
    for file, old, new, test in GUARDS:
        source = (ROOT / file).read_text(encoding="utf-8")
        if source.count(old) != 1:
            sys.exit(f"mutation_check: error: {file} has {source.count(old)} times: {old}")
        start = source.index(old)
        line = 1 + source[:start].count("\n")
        found.append(Mutation(file, start, start + len(old), line, old, new, (test,)))
    return found


def make_copy(folder: Path) -> None:
    """Copy what the tests need."""
    ignored = shutil.ignore_patterns("venv", "exp", "dump", "data", "downloads", ".git")
    for name in ("posinv", "test", "tools", "conf", "egs"):
        skip = shutil.ignore_patterns("venv") if name in ("posinv", "test") else ignored
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.cfg", "README.md"):
        shutil.copy(ROOT / name, folder)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder.parent / "shared").symlink_to(shared)


def try_one(mutation: Mutation, copy: Path) -> tuple[bool, str]:
    """Break the copy, run the tests, mend the copy; return whether they noticed, and how."""
    path = copy / mutation.file
    source = path.read_text(encoding="utf-8")
    broken = source[: mutation.start] + mutation.new + source[mutation.stop :]
    path.write_text(broken, encoding="utf-8")
    try:
        status, output = run_tests(copy, mutation.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if status is None:
        return True, "the tests do not end"
    failed = [x for x in output.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if status in (1, 2) and failed:
        return True, failed[0].split(" - ")[0].partition(" ")[2].rpartition("/")[2]
    return (False, "") if status == 0 else (True, f"pytest's exit status {status}")


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Return pytest's exit status, None if it doesn't end, and its output.

    The tests run in a fork of this process, which has imported what takes longest, but not posinv.
    """
    import torch  # noqa: F401
    import transformers  # noqa: F401

    assert "posinv" not in sys.modules
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if not pid:
            os.setsid()  # with what the tests start
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = str(copy)
            sys.path.insert(0, str(copy))
            sys.dont_write_bytecode = True
            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--hypothesis-seed=0"]
            status = 70
            try:
                status = int(pytest.main([*options, *tests]))
            finally:
                sys.stdout.flush()
                os._exit(status)
        deadline = time.monotonic() + TIMEOUT
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None, ""
            time.sleep(0.1)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), output.read()


def check_whole(copy: Path, tests: Sequence[str]) -> None:
    """End with an error unless the tests pass in a copy that isn't broken."""
    untouched = Mutation("setup.cfg", 0, 0, 1, "", "", tuple(tests))
    noticed, where = try_one(untouched, copy)
    if noticed:
        sys.exit(f"mutation_check: error: fails without any change: {where}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=40, help="default 40")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of places; default 0")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no more after these")
    parser.add_argument("--no_guards", action="store_true", help="the drawn places alone")
    parser.add_argument("--state", type=Path, default=Path("mutation_check.jsonl"))
    args = parser.parse_args()
    todo = draw(args.places, args.seed) + ([] if args.no_guards else guards())
    done = {}
    if args.state.exists():
        for line in args.state.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            done[entry["place"]] = entry
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        copy.mkdir()
        make_copy(copy)
        for mutation in todo:
            if str(mutation) in done or time.monotonic() - started > args.seconds:
                continue
            begun = time.monotonic()
            noticed, where = try_one(mutation, copy)
            if not noticed or len(done) < 1:
                check_whole(copy, mutation.tests)
            entry = {
                "place": str(mutation),
                "noticed": noticed,
                "by": where,
                "seconds": round(time.monotonic() - begun),
            }
            done[str(mutation)] = entry
            with args.state.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{'noticed' if noticed else 'NOT NOTICED'}: {mutation}", file=sys.stderr)
    print("| place | noticed by |\n| --- | --- |")
    entries = [done[str(mutation)] for mutation in todo if str(mutation) in done]
    for entry in entries:
        print(f"| {entry['place']} | {entry['by'] if entry['noticed'] else '**not noticed**'} |")
    noticed = sum(entry["noticed"] for entry in entries)
    seconds = sum(entry["seconds"] for entry in entries)
    print(
        f"\n{noticed} of {len(entries)} noticed, in {seconds} s; {len(todo) - len(entries)} to do"
    )


if __name__ == "__main__":
    main()
