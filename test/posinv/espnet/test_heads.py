"""Heads trained at once are those trained alone, by ESPnet's own ``asr_train``."""

import logging
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from espnet2.bin.asr_inference import Speech2Text
from espnet2.train.dataset import ESPnetDataset

from posinv.bin import ctc_inference
from posinv.data.audio import read_audio
from posinv.data.checkpoint import write_checkpoint
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.espnet.frontends import SSLFrontend
from posinv.espnet.heads import HeadsTask, parse_arguments
from posinv.espnet.tasks.asr import ASRTask
from posinv.report.curves import read_epochs

RNN = {"encoder": "rnn", "encoder_conf": {"num_layers": 1, "hidden_size": 8, "output_size": 8}}
MASKS = {
    **{"apply_time_warp": True, "time_warp_window": 2, "apply_freq_mask": True},
    **{"freq_mask_width_range": [0, 5], "num_freq_mask": 2, "apply_time_mask": True},
    **{"time_mask_width_range": [0, 3], "num_time_mask": 1},
}
# Heads of every kind: options, and the file of the targets.
HEADS = {
    "pr/drawn": ({**RNN, "specaug": "specaug", "specaug_conf": MASKS, "max_epoch": 4}, "text"),
    "pr/summed": ({**RNN, "accum_grad": 3, "optim_conf": {"lr": 0.1}, "max_epoch": 6}, "text"),
    "asr/scheduled": (
        {
            **{"preencoder": "linear", "preencoder_conf": {"input_size": 32, "output_size": 8}},
            **{"encoder": "blstm", "encoder_conf": {"hidden_size": 8, "dropout": 0.2}},
            **{"optim": "adam", "optim_conf": {"lr": 0.01}, "scheduler": "warmuplr"},
            **{"scheduler_conf": {"warmup_steps": 3}, "grad_clip": 0.5, "max_epoch": 5},
            **{"accum_grad": 2, "patience": 3, "keep_nbest_models": 2},
        },
        "letters",
    ),
}
COMMON = {
    **{"token_type": "word", "normalize": None, "model_conf": {"ctc_weight": 1.0}},
    **{"optim": "sgd", "optim_conf": {"lr": 0.02}, "resume": True, "keep_nbest_models": 9},
    **{"batch_type": "sorted", "batch_size": 3, "num_iters_per_epoch": 5, "num_workers": 0},
    **{"best_model_criterion": [["valid", "loss", "min"], ["valid", "cer_ctc", "min"]]},
    **{"use_matplotlib": False, "use_tensorboard": False, "num_att_plot": 0},
}
RUN_JOB = """
from posinv.espnet.heads import HeadsTask, parse_arguments
run_job = lambda options: HeadsTask.main(args=parse_arguments(options))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_utterances):
    """A folder with 10 utterances of different lengths, their words and letters."""
    folder = tmp_path_factory.mktemp("a corpus")
    write_utterances(folder, 10)
    rng = np.random.default_rng(0)
    for name, tokens in {"text": "abc", "letters": "defg"}.items():
        lines = [f"utt{i} {' '.join(rng.choice(list(tokens), 1 + i % 4))}\n" for i in range(10)]
        (folder / name).write_text("".join(lines))
        tokens = ["<blank>", "<unk>", *tokens, "<sos/eos>"]
        (folder / f"{name}_tokens").write_text("\n".join(tokens) + "\n")
    return folder


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    return tmp_path_factory.mktemp("exp")


@pytest.fixture(scope="module")
def command(corpus, exp, tiny_ssl):
    """Make the options of all heads, and of each head in a folder, with changes by its name."""

    def data(phase, name, kind):
        return [f"--{phase}_data_path_and_name_and_type", f"{corpus / name},{kind}"]

    common = ["--frontend", "ssl", "--frontend_conf", f"ssl={tiny_ssl}", "--seed", "3"]
    for phase in ("train", "valid"):
        common += data(phase, "wav.scp", "speech,sound")
        common += [f"--{phase}_shape_file", str(corpus / "shape")]

    def make(folder, names=tuple(HEADS), **changes):
        heads = {}
        for name in names:
            options, text = HEADS[name]
            changed = changes.get(name.replace("/", "_"), {}) | changes.get("all", {})
            seed = changed.pop("seed", None)
            path = exp / f"{folder} {name.replace('/', ' ')}.yaml"
            path.write_text(yaml.safe_dump(COMMON | options | changed))
            heads[name] = ["--config", str(path), "--token_list", str(corpus / f"{text}_tokens")]
            for phase in ("train", "valid"):
                heads[name] += data(phase, text, "text,text")
            if seed is not None:
                heads[name] += ["--seed", str(seed)]
        return common, heads

    return make


@pytest.fixture(scope="module")
def train(command, exp):
    """Train heads at once in exp/<folder>."""

    def run(folder, *args, extra=(), **changes):
        HeadsTask.main(
            args=parse_arguments(
                [*arguments(command, exp, folder, *args, **changes), *map(str, extra)]
            )
        )
        return exp / folder

    return run


def arguments(command, exp, folder, *args, **changes):
    common, heads = command(folder, *args, **changes)
    words = []
    for name, options in heads.items():
        words += ["--head", str(exp / folder / name), *options]
    return [*words, "--all", *common]


@pytest.fixture(scope="module")
def together(train):
    """The heads trained at once."""
    return train("together")


@pytest.fixture(scope="module")
def alone(command, exp):
    """Each head, trained by asr_train."""
    common, heads = command("alone")
    for name, options in heads.items():
        folder = str(exp / "alone" / name)
        ASRTask.main(cmd=[*common, *options, "--output_dir", folder])
    return exp / "alone"


def states(folder):
    """All checkpoints of a head."""
    paths = sorted(folder.glob("*epoch.pth"))
    assert paths
    return {path.name: torch.load(path, weights_only=True) for path in paths}


def curve(folder, names=None):
    """The statistics of all epochs, but for times."""
    return [
        [value for name, value in sorted(epoch[phase].items()) if name in (names or epoch[phase])]
        for epoch in read_epochs(folder)
        for phase in ("train", "valid")
    ]


def without_times(folder):
    names = {name for epoch in read_epochs(folder) for phase in epoch for name in epoch[phase]}
    return curve(folder, {name for name in names if "time" not in name})


def assert_same(first, second, names=tuple(HEADS)):
    """The same files, links, weights after each epoch that was kept, and statistics, to the bit."""
    for name in names:
        one, other = first / name, second / name
        files = [
            {path.name: path.readlink() if path.is_symlink() else "" for path in folder.iterdir()}
            for folder in (one, other)
        ]
        assert files[0] == files[1]
        for key, state in states(one).items():
            torch.testing.assert_close(state, states(other)[key], rtol=0, atol=0)
        for a, b in zip(without_times(one), without_times(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_heads_at_once_are_those_of_asr_train(together, alone):
    """Dropout, SpecAugment, schedule, unequal updates and all; to the bit."""
    assert_same(together, alone)
    epochs = [len(read_epochs(together / name)) for name in HEADS]
    assert epochs[:2] == [4, 6] and len(set(epochs)) > 1
    for name in HEADS:
        first, second = (
            yaml.safe_load((top / name / "config.yaml").read_text()) for top in (together, alone)
        )
        differ = {key for key in first if first[key] != second[key]}
        assert differ == {"output_dir", "config"} and first.keys() == second.keys()
        assert first["frontend"] == "ssl"
    losses = [epoch["train"]["loss"] for epoch in read_epochs(together / "pr/drawn")]
    assert losses[-1] < losses[0]  # it learns


def test_another_seed_draws_otherwise_from_the_same_batches(train, exp):
    """Its head is the same beside others and alone; no other head is changed by it."""
    seeds = {"pr_drawn": {"seed": 9}, "asr_scheduled": {"seed": 9}}
    beside = train("seeds", **seeds)
    assert_same(beside, exp / "together", ["pr/summed"])
    for name in ("pr/drawn", "asr/scheduled"):
        assert_same(beside, train(f"only {name.replace('/', ' ')}", [name], **seeds), [name])
        first, second = (states(top / name) for top in (beside, exp / "together"))
        key = next(iter(first.keys() & second.keys()))
        assert not torch.equal(first[key]["ctc.ctc_lo.weight"], second[key]["ctc.ctc_lo.weight"])


def test_killed_between_heads_it_goes_on(train, together, monkeypatch):
    """The first head's epoch is on disk, the others' are not: each gets what it lacks."""
    written = []

    def killed(state, path):
        if len(written) == 8:  # two files of each head in each epoch
            raise KeyboardInterrupt
        written.append(path)
        write_checkpoint(state, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("posinv.espnet.trainer.write_checkpoint", killed)
        train("killed")
    killed_at = [len(read_epochs(together.parent / "killed" / name)) for name in HEADS]
    assert killed_at == [2, 1, 1]
    assert_same(train("killed"), together)


def test_more_epochs_for_one_head(train, together):
    """Finished heads stay as they are."""
    shorter = train("longer", pr_summed={"max_epoch": 2})
    before = states(shorter / "pr/drawn")
    assert_same(train("longer"), together)
    assert states(shorter / "pr/drawn").keys() == before.keys()


@pytest.fixture(scope="module")
def ranks(exp, ranks_of):
    return ranks_of(exp, RUN_JOB)


def test_two_processes_killed_and_resumed(command, exp, train, ranks):
    """Two processes are one, without draws; killed at any time they go on as if they had not been.

    Each process draws its own, so dropout and SpecAugment are off.
    """
    still = {
        "all": {"batch_size": 5, "num_iters_per_epoch": None},
        "pr_drawn": {"specaug": None, "encoder_conf": {**RNN["encoder_conf"], "dropout": 0.0}},
        "pr_summed": {"encoder_conf": {**RNN["encoder_conf"], "dropout": 0.0}, "accum_grad": 2},
        "asr_scheduled": {"encoder_conf": {"hidden_size": 8, "dropout": 0.0}},
    }
    long = {**still, "all": still["all"] | {"max_epoch": 10, "patience": None}}
    job = [arguments(command, exp, name, **long) for name in ("unbroken", "broken")]
    processes = ranks.start([arguments(command, exp, "two", **still), *job])
    last = exp / "broken/asr/scheduled/latest.pth"
    while not last.exists():
        time.sleep(0.01)
        assert processes[0].poll() is None, ranks.said(0)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(read_epochs(exp / "broken/pr/drawn")) < 10
    ranks.finish(ranks.start(job[1:]))
    assert_same(exp / "broken", exp / "unbroken")
    train("one", **still)
    for name in HEADS:
        # Not the error rates: ESPnet takes the mean of those of the processes.
        one, two = (curve(exp / top / name, ["loss", "grad_norm"]) for top in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5)
        last = [torch.load(exp / top / name / "latest.pth") for top in ("one", "two")]
        # A thousandth of one step of Adam: it divides a small gradient by its own size.
        torch.testing.assert_close(*last, rtol=1e-4, atol=1e-5)


def test_the_loser_of_a_sweep_ends(train, exp, together, caplog):
    """Of the two PR heads; the ASR head has no rival. A resumed run decides the same."""
    caplog.set_level(logging.INFO)
    sweep = {"extra": ["--sweep_updates", 4], "pr_summed": {"accum_grad": 2}}
    swept = train("swept", **sweep)
    # pr/drawn has 5 updates in an epoch, pr/summed 2: all have 4 after the second epoch.
    values = {name: read_epochs(swept / name)[1]["valid"]["loss"] for name in HEADS}
    loser = max(("pr/drawn", "pr/summed"), key=values.__getitem__)
    assert values["pr/drawn"] != values["pr/summed"]
    assert len(read_epochs(swept / loser)) == 2
    [said] = [r.getMessage() for r in caplog.records if " ends: in epoch 2" in r.getMessage()]
    assert said.startswith(f"{swept / loser} ends") and "that of" in said
    assert (swept / loser / "valid.cer_ctc.best.pth").exists()
    others = [name for name in HEADS if name != loser]
    assert_same(swept, train("all the way", pr_summed={"accum_grad": 2}), others)
    before = {name: states(swept / name).keys() for name in HEADS}
    train("swept", **sweep)
    assert before == {name: states(swept / name).keys() for name in HEADS}


def test_front_end_runs_once_for_all_heads(train, monkeypatch):
    calls = []
    encode = SSLFrontend.encode
    monkeypatch.setattr(
        SSLFrontend, "encode", lambda self, *args: calls.append(1) or encode(self, *args)
    )
    train("calls", all={"max_epoch": 2, "patience": None})
    assert len(calls) == 2 * (5 + 3)  # batches of training and validation


@pytest.fixture
def reads(monkeypatch):
    """The utterances whose audio was read, in order."""
    found = []
    get = ESPnetDataset.__getitem__

    def counted(self, utt_id):
        name, data = get(self, utt_id)
        found.extend([name] if "speech" in data else [])
        return name, data

    monkeypatch.setattr(ESPnetDataset, "__getitem__", counted)
    return found


def test_audio_is_read_for_what_the_cache_lacks(train, command, exp, reads):
    """With room for all, for some or for no utterance, a head is that of asr_train with a cache."""

    def run(room, epochs, **more):
        reads.clear()
        conf = {"max_epoch": epochs, "frontend_conf": {"cache_gb": room}, **more}
        folder = train(f"room {room} {epochs} {len(more)}", ["pr/drawn"], all=conf)
        return folder, len(reads)

    (folder, all_fit), (_, one_epoch), (some_folder, some_fit), (none_folder, none_fit) = (
        run(*args) for args in ((1.0, 3), (1.0, 1), (3.3e-5, 3), (1e-9, 3))
    )
    assert all_fit == one_epoch < some_fit < none_fit and none_fit > 2 * one_epoch
    assert_same(some_folder, folder, ["pr/drawn"])
    assert_same(none_folder, folder, ["pr/drawn"])
    conf = {"max_epoch": 3, "frontend_conf": {"cache_gb": 1.0}}
    common, heads = command("alone, cached", ["pr/drawn"], all=conf)
    options = [*common, *heads["pr/drawn"], "--output_dir", str(exp / "alone, cached/pr/drawn")]
    ASRTask.main(cmd=options)
    assert_same(folder, exp / "alone, cached", ["pr/drawn"])
    effects = {"data_aug_effects": [[1.0, "polarity_inverse", {}]], "data_aug_prob": 0.5}
    assert run(1.0, 3, preprocessor_conf={"fs": 16000, **effects})[1] > 2 * one_epoch


def test_cache_in_files(train, exp, together, monkeypatch):
    """Each utterance is encoded once, for all trainings; float16 changes little."""
    calls = []
    encode = SSLFrontend.encode
    monkeypatch.setattr(
        SSLFrontend, "encode", lambda self, *args: calls.append(1) or encode(self, *args)
    )
    cached = train("cached", extra=["--cache_dir", exp / "cache"])
    assert len(calls) == 10
    assert_same(train("cached again", extra=["--cache_dir", exp / "cache"]), cached)
    assert len(calls) == 10
    [folder] = (exp / "cache").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"layers.0", "index.0"}
    train("one layer", all={"frontend_conf": {"layer": 1}}, extra=["--cache_dir", exp / "cache"])
    assert len(calls) == 20
    assert len(list((exp / "cache").iterdir())) == 2
    for name in HEADS:
        first, second = (read_epochs(top / name) for top in (cached, together))
        for one, other in zip(first, second, strict=True):
            np.testing.assert_allclose(one["valid"]["loss"], other["valid"]["loss"], rtol=2e-3)


def test_espnet_and_ctc_inference_load_a_head(corpus, together, tmp_path, monkeypatch):
    names = list(HEADS)
    folders = [str(together / name) for name in names]
    options = ["--wav_scp", str(corpus / "wav.scp"), "--batch_size", "4", "--heads", *folders]
    options += ["--out", *(str(tmp_path / f"text{i}") for i in range(len(names)))]
    monkeypatch.setattr(sys, "argv", ["ctc_inference", *options])
    ctc_inference.main()
    waves = {name: read_audio(path, 16000) for name, path in read_table(corpus / "wav.scp").items()}
    for i, folder in enumerate(folders):
        config, checkpoint = f"{folder}/config.yaml", f"{folder}/valid.cer_ctc.best.pth"
        texts = read_table(tmp_path / f"text{i}", allow_empty=True)
        model, args = ASRTask.build_model_from_file(config, checkpoint)
        model.eval()
        assert "frontend.weights" in dict(model.named_parameters())
        for name, wave in waves.items():
            encoded, _ = model.encode(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
            best = model.ctc.argmax(encoded)[0].unique_consecutive().tolist()
            assert texts[name] == " ".join(args.token_list[token] for token in best if token)
    recognise = Speech2Text(config, checkpoint, ctc_weight=1.0, beam_size=1)
    assert recognise(waves["utt0"])
    path = shutil.copytree(folders[-1], tmp_path / "other") / "config.yaml"
    argv = [*sys.argv[: sys.argv.index(folders[-1])], str(path.parent), *options[-4:]]
    monkeypatch.setattr(sys, "argv", argv)
    for old, new, message in (
        ("    ssl:", "    layer: 1\n    ssl:", r"other: its front end is \('ssl', \{'layer': 1, "),
        ("frontend: ssl", "frontend: default", "--frontend default: heads need ssl or enh_ssl"),
    ):
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(InputError, match=message):
            ctc_inference.main()


REFUSED = {
    "no head": (lambda a: a[a.index("--all") :], "no --head DIR"),
    "head without a directory": (lambda a: [*a, "--head"], "--head: needs the directory"),
    "head twice": (lambda a: [*a[: a.index("--all")], *a], "twice"),
    "other batches": (
        lambda a: [a[0], a[1], "--batch_size", "4", *a[2:]],
        "summed: --batch_size 3",
    ),
    "other front end": (
        lambda a: [a[0], a[1], "--frontend_conf", "layer=1", *a[2:]],
        "summed: --frontend_conf",
    ),
    "other audio": (
        lambda a: [*a[:2], "--train_data_path_and_name_and_type", "x,speech,sound", *a[2:]],
        "summed: --train_data_path_and_name_and_type",
    ),
    "chunks": (lambda a: [*a, "--iterator_type", "chunk"], "drawn: --iterator_type chunk: heads"),
    "no updates": (lambda a: [*a, "--sweep_updates", "0"], "--sweep_updates 0: must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_share_is_refused(command, exp, case):
    edit, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        parse_arguments(edit(arguments(command, exp, "refused")))


def test_bad_input_names_the_head(train, corpus, exp, monkeypatch):
    with pytest.raises(
        InputError, match=r"pr/summed: .*fewer: no text for utterance utt3 \(1 such"
    ):
        lines = (corpus / "text").read_text().splitlines(keepends=True)
        (corpus / "fewer").write_text("".join(line for line in lines if "utt3" not in line))
        with monkeypatch.context() as patch:
            patch.setitem(HEADS, "pr/summed", (HEADS["pr/summed"][0], "fewer"))
            shutil.copy(corpus / "text_tokens", corpus / "fewer_tokens")
            train("bad")
    with pytest.raises(InputError, match="--frontend default: heads need ssl or enh_ssl"):
        train("bad", all={"frontend_conf": {}}, extra=["--frontend", "default"])
    with pytest.raises(InputError, match=r"--head .*bad/pr/drawn: float32_matmul_precision"):
        train("bad", all={"float32_matmul_precision": "low"})
    criterion = {"all": {"best_model_criterion": [["valid", "acc", "min"]]}}
    with pytest.raises(InputError, match="acc on the validation set is no number for any head in"):
        train("bad", **criterion, extra=["--sweep_updates", 1])
    with pytest.raises(ValueError, match="foo"):
        train("bad", all={"optim": "foo"})
