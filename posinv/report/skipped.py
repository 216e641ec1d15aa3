"""What ``--on_bad_utt skip`` left out of the data that results were made from."""

from pathlib import Path

from posinv.data.directory import read_skipped
from posinv.data.tables import read_table


def left_out(dump: Path | str) -> str:
    """Return a line that counts what was left out of each set; empty if nothing was.

    Args:
        dump: folder of formatted data directories, each with ``wav.scp``, and with ``skipped``
            where utterances were left out.
    """
    counts = []
    for path in sorted(Path(dump).glob("*/skipped")):
        skipped = len(read_skipped(path.parent))
        total = skipped + len(read_table(path.parent / "wav.scp"))
        counts.append(f"{path.parent.name} {skipped} of {total}")
    if not counts:
        return ""
    return (
        f"Bad utterances left out (`--on_bad_utt skip`): {', '.join(counts)}. The reasons are in "
        f"`{dump}/<set>/skipped`.\n"
    )
