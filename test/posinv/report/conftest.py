import json
from pathlib import Path

import pytest

from posinv.data.tables import write_tsv
from posinv.scoring.text import UTTERANCE_COLUMNS, _utterances, error_rate


def write_decoded(folder: Path, sets: dict[str, dict[str, tuple[str, str]]]) -> None:
    """Write what score_text does: ``sets`` has (reference, hypothesis) by set and utterance."""
    scores, rows = {}, []
    for name, utterances in sets.items():
        refs, hyps = ({i: texts[k] for i, texts in utterances.items()} for k in (0, 1))
        scores[name] = error_rate(refs, hyps, "word").to_dict()
        rows += _utterances(refs, hyps, name, "word")
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    write_tsv(folder / "scores.tsv", UTTERANCE_COLUMNS, rows)


@pytest.fixture
def experiment_of(tmp_path):
    """Make an experiment from wrong words: ``{seed: {system: {utterance: errors of 4 words}}}``."""

    def make(errors, names=("test_clean",)):
        for seed, systems in errors.items():
            for system, counts in systems.items():
                utterances = {
                    utterance: ("a b c d", " ".join("abcd"[: 4 - wrong]))
                    for utterance, wrong in counts.items()
                }
                for task in ("pr", "asr"):
                    best = tmp_path / "exp" / f"seed{seed}" / system / "superb" / task / "best"
                    write_decoded(best / "decode", dict.fromkeys(names, utterances))
        return tmp_path / "exp"

    return make
