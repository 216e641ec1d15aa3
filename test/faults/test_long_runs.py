"""Long trainings: memory, open files and logs stay as they are."""

import logging
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel

from posinv.data.directory import format_data
from posinv.espnet.tasks.checked import LimitRepeats

CONFIG = {
    "optim": "adamw",
    "optim_conf": {"lr": 1e-4},
    "batch_type": "sorted",
    "batch_size": 2,
    "num_workers": 0,
    "use_matplotlib": False,
    "use_tensorboard": True,
    "model_conf": {"projection_size": 8, "trainable_layers": 1},
    "best_model_criterion": [["valid", "loss", "min"]],
    "keep_nbest_models": 1,
}


@pytest.mark.faults
def test_memory_files_and_log_of_2000_updates(corpus, tmp_path, python, fork_server, tried):
    """20 epochs of 100 updates."""
    format_data(corpus, tmp_path / "data", 16000)
    HubertModel(HubertConfig(**TINY_SSL)).save_pretrained(tmp_path / "ssl")
    config = CONFIG | {"max_epoch": 20, "num_iters_per_epoch": 100}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    args = ["--config", "train.yaml", "--ssl", "ssl", "--output_dir", "exp"]
    for part in ("train", "valid"):
        args += [f"--{part}_data_path_and_name_and_type", "data/wav.scp,speech,sound"]
        args += [f"--{part}_shape_file", "data/utt2num_samples"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*python, "-m", "posinv.bin.ssft_train", *args], cwd=tmp_path, stdout=file, stderr=file
        )
        seen = []  # epoch, resident memory in MB, open files
        while process.poll() is None:
            time.sleep(0.2)
            epoch = log.read_text().count("epoch started")
            for pid in forks(fork_server, tmp_path):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                except OSError:
                    continue  # it has just ended
                if "VmRSS" in status:
                    memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
                    seen.append((epoch, memory, files))
    assert process.returncode == 0, log.read_text()[-3000:]
    early = [row[1:] for row in seen if row[0] in (5, 6)]
    late = [row[1:] for row in seen if row[0] in (18, 19)]
    before, after = (max(memory for memory, _ in rows) for rows in (early, late))
    assert after < before + 10
    # A checkpoint is open only while it is written. A leaked file stays open: the minimum rises.
    assert min(files for _, files in late) <= min(files for _, files in early)
    lines = log.read_text().splitlines()
    assert len(lines) < 1000
    tried(
        "a training of 2,000 updates at toy size",
        f"memory {before:.0f} MB at epoch 5, {after:.0f} MB at 19; open files as before; "
        f"{len(lines)} lines of log",
    )


def forks(server, folder):
    found = ["pgrep", "--full", f"fork_server.py start {server}"]
    for pid in subprocess.run(found, capture_output=True, text=True).stdout.split():
        try:
            if Path(f"/proc/{pid}/cwd").readlink() == folder:
                yield pid
        except OSError:
            continue


def test_a_warning_in_each_update_does_not_fill_the_disk(caplog):
    logger = logging.getLogger("a training")
    repeats = LimitRepeats()
    logger.addFilter(repeats)
    with caplog.at_level(logging.INFO):
        for update in range(2000):
            logger.info("update %d", update)
            logger.warning("the gradient of update %d is not finite", update)
        logger.warning("another one")
    logger.removeFilter(repeats)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 101
    assert said[99] == (
        "the gradient of update 99 is not finite (said 100 times; no more of these are logged)"
    )
    assert said[100] == "another one"
    assert sum(record.levelname == "INFO" for record in caplog.records) == 2000
