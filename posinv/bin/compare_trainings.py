"""Say in what a training differs from the one that its folder was made by.

Exit status 0: the training can go on. No value differs, or only the number of epochs has grown, or
there are other heads beside those that stay, which don't depend on each other (heads_train).
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from posinv.bin.cli import command_parser, run
from posinv.data.files import read_yaml
from posinv.errors import InputError
from posinv.head_arguments import split_arguments

MAX_EPOCH = "max_epoch"
ABSENT, HEAD = "none", "a head"


def main() -> None:
    """Print the differences; raise if the folder can't be used."""
    parser = command_parser(__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="with run.sh and inputs/")
    parser.add_argument("--record", required=True, help="the text of the new run.sh")
    args = parser.parse_args()
    found = differences(args.dir, (args.dir / "run.sh").read_text(), args.record)
    if not found:
        print(f"{args.dir}: comments or the order of options changed, no value: it goes on")
        return
    refused = [difference for difference in found if not _goes_on(*difference)]
    for name, _, new in found if not refused else ():
        what = f"{name} has grown to {new}" if name == MAX_EPOCH else f"{name}: {new} now"
        print(f"{args.dir}: {what}: the training goes on")
    if refused:
        lines = "; ".join(f"{name}: {old} there, {new} now" for name, old, new in refused)
        raise InputError(
            f"{args.dir} was made by another training: {lines}: remove it, or choose another "
            "--expdir"
        )


def _goes_on(name: str, old: object, new: object) -> bool:
    if name == MAX_EPOCH:
        return isinstance(old, int) and isinstance(new, int) and old < new
    return {old, new} == {ABSENT, HEAD}


def differences(directory: Path, old: str, new: str) -> list[tuple[str, object, object]]:
    """Compare two records of a training, key by key: name, old value, new value.

    Args:
        directory: with ``inputs/``, copies of the YAML files that the old record names.
        old: the text of a ``run.sh``.
        new: of another.
    """
    there, now = _options(old), _options(new)
    found: list[tuple[str, object, object]] = []
    for head in sorted(there.keys() | now.keys()):
        if head in there and head in now:
            found += _compare(there[head], now[head], f"{head} --".lstrip())
        elif head in there:
            found.append((head, HEAD, ABSENT))
        else:
            found.append((head, ABSENT, HEAD))
    before, after = _inputs(old), _inputs(new)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path):
            continue
        copy = directory / "inputs" / path.replace("/", "%")
        if path in before and path in after and copy.is_file():
            found += _compare(_flat(copy), _flat(Path(path)), "")
        elif path in before and path in after:
            found.append((path, "another content", "changed"))
        else:
            found.append((path, before.get(path, ABSENT), after.get(path, ABSENT)))
    return found


def _compare(
    before: Mapping[str, object], after: Mapping[str, object], prefix: str
) -> list[tuple[str, object, object]]:
    return [
        (prefix + name, before.get(name, ABSENT), after.get(name, ABSENT))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _options(record: str) -> dict[str, dict[str, str]]:
    """The command's options by name: those of each head by ``--head DIR``, all others by ""."""
    common, heads = split_arguments(shlex.split(record.splitlines()[-1]))
    by_head = {f"--head {directory}": _by_name(words) for directory, words in heads.items()}
    return {"": _by_name(common), **by_head}


def _by_name(words: Sequence[str]) -> dict[str, str]:
    """Options and their values; those given several times have their values joined."""
    options: dict[str, str] = {}
    name = "command"
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            options.setdefault(name, "")
        else:
            options[name] = f"{options.get(name, '')} {word}".strip()
    return options


def _inputs(record: str) -> dict[str, str]:
    lines = [line.split(maxsplit=3) for line in record.splitlines() if line.startswith("#   ")]
    return {path: f"{checksum} {size}" for _, checksum, size, path in lines}


def _flat(path: Path) -> dict[str, object]:
    """A YAML file's values by dotted key."""

    def walk(value: object, prefix: str) -> dict[str, object]:
        if not isinstance(value, dict):
            return {prefix: value}
        entries = [walk(item, f"{prefix}.{key}".strip(".")) for key, item in value.items()]
        return {name: item for entry in entries for name, item in entry.items()}

    return walk(read_yaml(path, "configuration"), "")


if __name__ == "__main__":
    run(main)
