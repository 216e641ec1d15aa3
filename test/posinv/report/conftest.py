import datetime
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.train.reporter import Reporter

from posinv.data.tables import write_table, write_tsv
from posinv.scoring.text import UTTERANCE_COLUMNS, _utterances, error_rate


def write_decoded(folder: Path, sets: dict[str, dict[str, tuple[str, str]]]) -> None:
    """Write what score_heads does: ``sets`` has (reference, hypothesis) by set and utterance."""
    scores, rows = {}, []
    for name, utterances in sets.items():
        refs, hyps = ({i: texts[k] for i, texts in utterances.items()} for k in (0, 1))
        scores[name] = error_rate(refs, hyps, "word").to_dict()
        rows += _utterances(refs, hyps, name, "word")
    folder.mkdir(parents=True, exist_ok=True)
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


def write_checkpoint(training, epochs, **statistics):
    """Write the checkpoint of an ESPnet training; statistics are functions of the epoch."""
    reporter = Reporter(epochs)
    reporter.stats = {
        epoch: {
            phase: {
                "loss": np.float32(1 / (epoch + k)),
                "time": datetime.timedelta(seconds=60 * epoch),
                "total_count": epoch,
                **{name: of(epoch) for name, of in statistics.items()},
            }
            for k, phase in enumerate(("train", "valid"))
        }
        for epoch in range(epochs, 0, -1)
    }
    training.mkdir(parents=True, exist_ok=True)
    state = {"model": {"w": torch.zeros(2)}, "reporter": reporter.state_dict()}
    torch.save(state, training / "checkpoint.pth")


@pytest.fixture
def save_epochs():
    """The function that writes the checkpoint of an ESPnet training."""
    return write_checkpoint


@pytest.fixture(scope="session")
def enh_experiment(tmp_path_factory, tiny_ssl):
    """What enh1 leaves, with names that a web page could take for markup; returns its exp."""
    recipe = tmp_path_factory.mktemp("a recipe")
    exp, data = recipe / "exp", recipe / "dump" / "raw" / "test_all"
    random = np.random.default_rng(0)
    names = ["quo\"te'&", "s<script>alert(1)</script>", "p3", "p4", "u5", "u6"]
    sets = {name: f"test_{'clean' if k % 2 else 'seen'}" for k, name in enumerate(names)}

    def recordings(folder: Path) -> dict[str, Path]:
        folder.mkdir(parents=True)
        paths = {name: folder / f"{number}.wav" for number, name in enumerate(names)}
        for path in paths.values():
            soundfile.write(path, 0.1 * random.standard_normal(12000), 16000)
        return {name: path.relative_to(recipe) for name, path in paths.items()}

    for scp in ("wav.scp", "spk1.scp"):
        paths = recordings(data / scp[:3])
        write_table(data / scp, paths)
    write_table(data / "utt2set", sets)
    write_table(data / "utt2num_samples", dict.fromkeys(names, 12000))
    for seed in ("1", "2"):
        for system in ("noisy", "enh", "ssl_mse", "my <b>system"):
            folder = exp / f"seed{seed}" / system
            for task in ("pr", "asr"):
                best = folder / "superb" / task / "best"
                texts = {
                    name: ("the <b>bold</b> word", " ".join(random.choice(["the", "<i>"], 3)))
                    for name in names
                }
                of_sets = {
                    name: {i: text for i, text in texts.items() if sets[i] == name}
                    for name in ("test_seen", "test_clean")
                }
                write_decoded(best / "decode", of_sets)
                (best / "decode" / "scores.json.inputs").write_text(
                    "# Its inputs, as cksum prints them:\n#   1 2 dump/raw/test_all/text\n"
                )
                write_checkpoint(best, 3, cer_ctc=lambda epoch: 1 / epoch)
                weights = torch.from_numpy(random.standard_normal(4))
                torch.save({"frontend.weights": weights}, best / "valid.cer_ctc.best.pth")
            si_sdr = 4.25 if system == "ssl_mse" else 3.25
            scores = {"si_sdr": si_sdr, "stoi": 0.5, "pesq": None, "utterances": 3}
            scores |= {"si_sdr_failed": 0, "stoi_failed": 0, "pesq_failed": None}
            scores |= {"dnsmos": 2.5, "dnsmos_failed": 0}
            if system != "noisy":
                paths = recordings(folder / "enhanced")
                write_table(folder / "enhanced" / "spk1.scp", paths)
            (folder / "enhanced").mkdir(exist_ok=True)
            (folder / "enhanced" / "scores.json").write_text(json.dumps({"test_seen": scores}))
            rows = [{"utterance": name, "set": sets[name], "si_sdr": si_sdr} for name in names]
            write_tsv(folder / "enhanced" / "scores.tsv", ("utterance", "set", "si_sdr"), rows)
            if system not in ("noisy", "enh"):
                write_checkpoint(folder, 3)
                conf = {"ssl": tiny_ssl, "layer": -1 if system == "ssl_mse" else 0}
                config = {"criterions": [{"name": "<i>", "conf": conf}], "accum_grad": 2}
                (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (exp / "stages.tsv").write_text(
        "stage\ttitle\tseconds\tended\tcommand\n"
        "1\tdata\t12\t2026-11-27 20:00\t./run.sh --title '<b>'\n"
    )
    return exp
