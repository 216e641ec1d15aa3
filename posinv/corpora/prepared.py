"""The result of preparing a corpus, the same for all corpora."""

from dataclasses import dataclass
from pathlib import Path

from posinv.data.directory import DataDir
from posinv.errors import InputError


@dataclass(frozen=True)
class Contents:
    """What a data directory holds.

    Attributes:
        utterances: how many, or how many recordings of noise.
        speakers: how many; None for noise.
        minutes: of audio; None where none was read.
    """

    utterances: int
    speakers: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, data: DataDir, minutes: float | None = None) -> "Contents":
        """Count a data directory's utterances and speakers."""
        return cls(len(data.wav), len(set(data.utt2spk.values())), minutes)

    def __str__(self) -> str:
        words = f"{self.utterances} recordings"
        if self.speakers is not None:
            speakers = "speaker" if self.speakers == 1 else "speakers"
            words = f"{self.utterances} utterances of {self.speakers} {speakers}"
        return words if self.minutes is None else f"{words}, {self.minutes:.1f} minutes"


@dataclass(frozen=True)
class Prepared:
    """What was written for a corpus. ``str()`` of it is the text that the command prints.

    Attributes:
        directories: the data directories written.
        left_out: audio files without a transcript, which are in none of them.
        notes: lines on what was changed or guessed.
    """

    directories: dict[Path, Contents]
    left_out: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{directory}: {contents}" for directory, contents in self.directories.items()]
        if self.left_out:
            names = ", ".join(path.name for path in self.left_out)
            lines.append(f"left out, without a transcript: {len(self.left_out)} files: {names}")
        return "\n".join([*lines, *self.notes])


def wanted_minutes(train: float, dev: float, test: float, limit: float) -> dict[str, float]:
    """Return the minutes wanted by split.

    Raises:
        InputError: minutes that are not between 0 and the limit.
    """
    wanted = {"train": train, "dev": dev, "test": test}
    for split, value in wanted.items():
        if not 0 < value < limit:
            raise InputError(f"minutes of {split}: {value}: from 0 to {limit}")
    return wanted
