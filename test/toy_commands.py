"""posinv's commands on a tiny corpus, with disks that are full and kills at file operations."""

import subprocess

import torch
import yaml
from tiny_ssl import TINY_SSL
from transformers import HubertConfig, HubertModel

from posinv.data.directory import format_data

# broken SIZE OPERATION MODULE [ARG ...]: run MODULE, whose files have at most SIZE bytes (0: any),
# and kill it before the file operation of this number in "out" or ".out*" (0: none). How many there
# were goes to stderr at the end.
BROKEN = """
import atexit, os, resource, runpy, signal, sys
size, operation, module = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[:3]
if size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
count, out = 0, (os.path.abspath("out"), os.path.abspath(".out"))
CHANGES = {"os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir"}
def watch(event, args):
    global count
    if event == "open":
        path, mode, flags = args
        if not (flags & (os.O_WRONLY | os.O_RDWR)):
            return
    elif event in CHANGES:
        path = args[1] if event in ("os.rename", "os.symlink") else args[0]
    else:
        return
    if isinstance(path, (str, bytes)) and os.path.abspath(os.fsdecode(path)).startswith(out):
        count += 1
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
atexit.register(lambda: print(count, "operations", file=sys.stderr))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
TRAINING = {
    **{"optim": "sgd", "max_epoch": 2, "batch_type": "sorted", "batch_size": 2},
    **{"num_workers": 0, "use_matplotlib": False, "use_tensorboard": False},
}
ENH = {
    **TRAINING,
    **{"encoder": "same", "decoder": "same", "separator": "demucs"},
    "separator_conf": {"hidden": 8, "depth": 2, "resample": 1, "causal": True},
    "criterions": [
        {"name": "l1_td", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {"weight": 1.0}}
    ],
    "best_model_criterion": [["valid", "loss", "min"]],
}
HEAD = {
    **TRAINING,
    **{"normalize": None, "preencoder": "linear", "encoder": "blstm"},
    "preencoder_conf": {"input_size": 32, "output_size": 8},
    "encoder_conf": {"hidden_size": 8, "num_layers": 1, "dropout": 0.0},
    "model_conf": {"ctc_weight": 1.0, "report_wer": False},
    "best_model_criterion": [["valid", "cer_ctc", "min"]],
}


def of_both(*entries):
    """Return the options of data for training and validation."""
    return [
        word
        for part in ("train", "valid")
        for word in (
            *(x for e in entries for x in (f"--{part}_data_path_and_name_and_type", f"data/{e}")),
            *(f"--{part}_shape_file", "data/utt2num_samples"),
        )
    ]


class Commands:
    """posinv's commands in a folder, which has data, configurations and trained models."""

    def __init__(self, folder, python, corpus):
        self.folder, self.python = folder, python
        (folder / "broken.py").write_text(BROKEN)
        format_data(corpus, folder / "data", 16000)
        tiny_ssl().save_pretrained(folder / "ssl")
        (folder / "head.yaml").write_text(yaml.safe_dump(HEAD))
        letters = ["<space>" if x == " " else x for x in sorted(set("one two"))]
        tokens = ["<blank>", "<unk>", *letters, "<sos/eos>"]
        (folder / "tokens").write_text("\n".join(tokens) + "\n")
        for command in (self.enh_train("enh"), heads_train("heads")):
            done = self.run(*command)
            assert done.returncode == 0, done.stderr

    def start(self, name, *args, size=0, operation=0):
        broken = ["broken", size, operation, f"posinv.bin.{name}", *args]
        return subprocess.Popen(
            [*self.python, "-m", *map(str, broken)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, name, *args, size=0, operation=0):
        """Run a command, see BROKEN."""
        process = self.start(name, *args, size=size, operation=operation)
        output, error = process.communicate(timeout=120)
        return subprocess.CompletedProcess(args, process.returncode, output, error)

    def enh_train(self, out, **changes):
        config = self.folder / f"{out}.yaml"
        config.write_text(yaml.safe_dump({**ENH, **changes}))
        return [
            *("enh_train", "--config", config, "--output_dir", out, "--resume", "true"),
            *of_both("wav.scp,speech_mix,sound", "wav.scp,speech_ref1,sound"),
        ]


def tiny_ssl():
    torch.manual_seed(0)
    return HubertModel(HubertConfig(**TINY_SSL))


def heads_train(out):
    return [
        *("heads_train", "--head", f"{out}/head", "--config", "head.yaml", "--all"),
        *("--token_type", "char", "--token_list", "tokens", "--resume", "true"),
        *("--frontend", "ssl", "--frontend_conf", "ssl=ssl"),
        *of_both("wav.scp,speech,sound", "text,text,text"),
    ]


# Commands that write "out", and sizes of files that are too small for them.
OUTPUTS = {
    "training": (lambda commands: commands.enh_train("out"), [3000, 9000]),
    "heads": (lambda commands: heads_train("out"), [6000, 9000]),
    "enhanced sets": (
        lambda commands: [
            *("enh_inference", "--fs", "16000", "--output_dir", "out", "--num_workers", "0"),
            *("--model_file", "enh/valid.loss.best.pth", "--train_config", "enh/config.yaml"),
            *("--data_path_and_name_and_type", "data/wav.scp,speech_mix,sound"),
        ],
        [3000, 8000],
    ),
    "enhanced files": (
        lambda commands: [
            *("enhance", "--model", "enh", "data/wav.scp", "--out", "out", "--skip_existing"),
            *("--format", "wav"),
        ],
        [9000, 11000],
    ),
    "data directory": (
        lambda commands: [
            *("format_data", "--src", "data", "--out", "out", "--nj", "1"),
        ],
        [1, 9000],
    ),
    "decodes": (
        lambda commands: [
            *("ctc_inference", "--heads", "heads/head", "--wav_scp", "data/wav.scp"),
            *("--out", "out/text"),
        ],
        [1],
    ),
    "export": (lambda commands: ["export", "--exp", "enh", "--out", "out"], [1, 3000]),
    "cache_dir": (lambda commands: [*heads_train("out"), "--cache_dir", "out"], [3000]),
}
