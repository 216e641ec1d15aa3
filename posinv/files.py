"""Text files that appear whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, by way of a temporary file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
