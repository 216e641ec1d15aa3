"""Every kind of damage to a corpus has its documented outcome, and no other."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from posinv.bin.damage_corpus import main
from posinv.bin.results_options import publish
from posinv.corpora.damage import KINDS, damage_corpus, kinds_table
from posinv.corpora.imported import import_kaldi
from posinv.corpora.noisy import Mixing, mix_noise
from posinv.data.directory import format_data, read_skipped, validate
from posinv.data.tables import read_table
from posinv.errors import InputError
from posinv.inference.enhancer import Enhancer, plan_enhancement
from posinv.report.skipped import left_out

ROOT = Path(__file__).resolve().parents[2]
RATE = 16000
ALIGN = {"phn": 1, "char": 1}
REFUSED = [name for name, kind in KINDS.items() if kind.refused and kind.stage == "format"]
HANDLED = [name for name, kind in KINDS.items() if not kind.refused]
SLOW = [pytest.param(n, marks=pytest.mark.faults if KINDS[n].heavy else ()) for n in HANDLED]
BOUND = "unreadable"  # permissions don't bind root: tested by a command that gives up that right


@pytest.fixture
def damaged(corpus, tmp_path):
    """Make a damaged copy: its folder, and the utterances that were damaged."""

    def make(kind, utterances=1):
        folder = tmp_path / "damaged"
        return folder, damage_corpus(corpus, folder, kind, utterances)

    return make


def check(error: pytest.ExceptionInfo, kind: str, folder: Path, utts: list[str]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert re.search(KINDS[kind].refused, message), message
    assert any(utt in message for utt in utts) or str(folder) in message


def test_there_are_many_kinds_each_with_its_outcome():
    assert len(KINDS) >= 25
    assert all(kind.outcome and kind.what for kind in KINDS.values())


def test_the_table_in_the_readme_is_that_of_the_code():
    readme = (ROOT / "egs" / "README.md").read_text()
    assert kinds_table() in readme, "python -m posinv.bin.damage_corpus --table prints it"


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.heavy])
def test_a_copy_leaves_its_source_alone(corpus, damaged, kind):
    before = {p: p.read_bytes() for p in corpus.rglob("*") if p.is_file()}
    folder, utts = damaged(kind, 2)
    assert before == {p: p.read_bytes() for p in corpus.rglob("*") if p.is_file()}
    assert len(utts) == 2
    for path in folder.iterdir():
        if path.is_file():
            assert path.read_bytes() != b"" or kind == "text_empty"


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind != BOUND])
def test_what_is_refused(damaged, tmp_path, kind):
    folder, utts = damaged(kind)
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(["W", "AH", "N", "T", "UW", *"onetw a", "<space>"]) + "\n")
    with pytest.raises(InputError) as error:
        validate(folder, RATE, {"phn": tokens, "char": tokens}, align=ALIGN)
    check(error, kind, folder, utts)
    with pytest.raises(InputError) as error:
        format_data(folder, tmp_path / "dump", RATE, align=ALIGN)
    check(error, kind, folder, utts)
    assert not (tmp_path / "dump").exists()


@pytest.mark.parametrize(
    "kind, nj",
    [
        *((kind, 1) for kind in REFUSED if KINDS[kind].of_utterance and kind != BOUND),
        *(("wav_cut", 2), ("entry_missing", 2)),
    ],
)
def test_what_is_left_out_is_listed(corpus, damaged, tmp_path, kind, nj):
    folder, utts = damaged(kind, 2)
    format_data(folder, tmp_path / "dump", RATE, on_bad_utt="skip", align=ALIGN, nj=nj)
    skipped = read_skipped(tmp_path / "dump")
    assert sorted(skipped) == utts
    kept = set(read_table(corpus / "text")) - set(utts)
    for name in ("wav.scp", "text", "phn", "utt2spk", "utt2num_samples", "utt2digest"):
        assert set(read_table(tmp_path / "dump" / name)) == kept
    if "nothing in" not in skipped[utts[0]]:
        assert re.search(KINDS[kind].refused, skipped[utts[0]])
    # what was left out before stays listed
    for on_bad_utt in ("stop", "skip"):
        format_data(tmp_path / "dump", tmp_path / on_bad_utt, RATE, on_bad_utt=on_bad_utt)
        assert read_skipped(tmp_path / on_bad_utt) == skipped


@pytest.mark.parametrize("kind", [k for k in REFUSED if not KINDS[k].of_utterance and k != BOUND])
def test_a_damaged_list_is_refused_though_utterances_may_be_skipped(damaged, tmp_path, kind):
    folder, utts = damaged(kind)
    with pytest.raises(InputError) as error:
        format_data(folder, tmp_path / "dump", RATE, on_bad_utt="skip")
    check(error, kind, folder, utts)
    assert not (tmp_path / "dump").exists()


def test_nothing_left_is_an_error(damaged, tmp_path):
    folder, utts = damaged("wav_cut", 4)
    with pytest.raises(InputError, match=rf"no utterance is left: {utts[0]}: .*cut short.*4 such"):
        format_data(folder, tmp_path / "dump", RATE, on_bad_utt="skip")


@pytest.mark.parametrize("kind", SLOW)
def test_what_is_handled(corpus, damaged, tmp_path, kind):
    folder, _utts = damaged(kind, 1 if KINDS[kind].heavy else 2)
    for on_bad_utt in ("stop", "skip"):
        out = tmp_path / on_bad_utt
        format_data(folder, out, RATE, align=ALIGN, on_bad_utt=on_bad_utt)
        assert not read_skipped(out)
        made = read_table(out / "text")
        assert len(made) == len(read_table(corpus / "text"))
        assert validate(out, RATE) > 20000
    plain = {utt: words.split("<")[0].strip() for utt, words in made.items()}
    assert set(plain.values()) == {"one two"}


def test_silence_is_formatted_but_gets_no_noise(damaged, tmp_path):
    folder, utts = damaged("silence")
    format_data(folder, tmp_path / "dump", RATE)
    mixing = Mixing(["white"], [5], 0, "n")
    with pytest.raises(InputError) as error:
        mix_noise(folder, tmp_path / "noisy", mixing)
    check(error, "silence", folder, utts)
    assert mix_noise(folder, tmp_path / "noisy", mixing, on_bad_utt="skip") == 3
    assert list(read_skipped(tmp_path / "noisy")) == [f"{utts[0]}-n"]


@pytest.mark.parametrize("nj", [1, 2])
def test_babble_is_not_made_of_what_is_left_out(damaged, tmp_path, nj):
    folder, utts = damaged("wav_cut")
    mixing = Mixing(["babble"], [5], 0, "n", babble=folder)
    with pytest.raises(InputError, match="cut short"):
        mix_noise(folder, tmp_path / "noisy", mixing, nj=nj)
    assert mix_noise(folder, tmp_path / "noisy", mixing, 3, nj, on_bad_utt="skip") == 9
    assert sorted(read_skipped(tmp_path / "noisy")) == [f"{utts[0]}-{n}" for n in ("n", "n2", "n3")]
    manifest = (tmp_path / "noisy" / "manifest.tsv").read_text().splitlines()[1:]
    assert not any(utts[0] in line.split("\t")[-1].split(",") for line in manifest)
    # a draw does not depend on the number of processes
    mix_noise(folder, tmp_path / "other", mixing, 3, 3 - nj, on_bad_utt="skip")
    assert (tmp_path / "other" / "manifest.tsv").read_text().splitlines()[1:] == manifest


def test_commands_are_for_lists_of_ones_own(damaged, tmp_path):
    folder, utts = damaged("command")
    format_data(folder, tmp_path / "dump", RATE)
    for refuse in (
        lambda: import_kaldi(folder, tmp_path / "imported"),
        lambda: plan_enhancement([folder / "wav.scp"], tmp_path / "enhanced"),
    ):
        with pytest.raises(InputError) as error:
            refuse()
        check(error, "command", folder, utts)
        assert "--allow_pipes" in str(error.value)
    import_kaldi(folder, tmp_path / "imported", allow_pipes=True)
    assert len(plan_enhancement([folder / "wav.scp"], tmp_path / "e", allow_pipes=True)[0]) == 4


FORMAT = """
for file in options stages records jobs data; do . "$scripts/$file.sh"; done
raw=dump/raw sampling_rate=16000 nj=1 cmd_backend=local python=python3 num_nodes=1 expdir=exp
resampling=() alignable=(--align phn char) on_bad_utt=$1
format train train --clean
"""


def test_what_is_left_out_is_counted_in_a_recipe(corpus, tmp_path):
    (tmp_path / "data").mkdir()
    [utt] = damage_corpus(corpus, tmp_path / "data" / "train", "nan")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"scripts": str(ROOT / "egs" / "TEMPLATE" / "scripts"), "PYTHONPATH": str(ROOT)}

    def run(on_bad_utt):
        start = ["bash", "-euo", "pipefail", "-c", FORMAT, "recipe", on_bad_utt]
        return subprocess.run(start, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = run("stop")
    assert (
        done.returncode == 1 and utt in done.stderr and not (tmp_path / "dump/raw/train").exists()
    )
    assert left_out(tmp_path / "dump" / "raw") == ""
    done = run("skip")
    listed = "dump/raw/train/skipped"
    assert f"1 bad utterances left out: {listed} says why" in done.stdout, done.stderr
    assert left_out(tmp_path / "dump" / "raw").startswith(
        "Bad utterances left out (`--on_bad_utt skip`): train 1 of 4. The reasons are in "
    )
    assert utt in (tmp_path / listed).read_text()


def test_the_count_stands_under_the_table(corpus, tmp_path, capsys):
    damage_corpus(corpus, tmp_path / "train", "nan", 2)
    format_data(tmp_path / "train", tmp_path / "raw" / "train", RATE, on_bad_utt="skip")
    for dump, counted in ((None, False), (tmp_path / "raw", True)):
        out = tmp_path / "RESULTS.md"
        publish("| table |\n", Namespace(out=out, title="T", command="run.sh", dump=dump))
        said = "Bad utterances left out (`--on_bad_utt skip`): train 2 of 4."
        assert (said in out.read_text()) == (said in capsys.readouterr().out) == counted


ENHANCED = (  # what Enhancer takes though format_data does not
    *("over_full_scale", "one_sample", "stereo", "rate_8k", "rate_44k1", "rate_48k"),
    *("reference_length", "entry_missing", "speaker_missing", "audio_missing", "transcript_empty"),
    *("transcript_long",),
)


@pytest.mark.parametrize("kind", [k for k in REFUSED if KINDS[k].of_utterance and k != BOUND])
def test_enhance_names_what_it_cannot_read(damaged, tmp_path, kind, caplog):
    folder, _utts = damaged(kind)
    enhancer = Enhancer.__new__(Enhancer)
    enhancer.model, enhancer.segment, enhancer.overlap, enhancer.dry = Path("m"), 16000, 1600, 0.0
    enhancer.separate = lambda wave, fs: [wave]
    jobs, wrong = plan_enhancement([folder / "wav.scp"], tmp_path / "out", allow_pipes=True)
    for job in jobs:
        try:
            enhancer.enhance_file(job.source, job.destination)
        except InputError as error:
            wrong[job.source] = str(error)
            assert not job.destination.exists()
    if kind in ENHANCED:
        assert not wrong
        return
    [(source, message)] = wrong.items()
    assert source in message and "\n" not in message and source in (folder / "wav.scp").read_text()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's capabilities")
def test_a_file_without_permission(damaged, tmp_path, command):
    folder, utts = damaged(BOUND)
    out = tmp_path / "dump"
    done = command("format_data", "--src", folder, "--out", out, "--nj", 1, bound=True)
    if done.returncode == 0:
        pytest.skip("this user may read every file")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert re.search(KINDS[BOUND].refused, done.stderr) and utts[0] in done.stderr
    done = command("validate_data", folder, "--nj", 1, bound=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    skip = ("--on_bad_utt", "skip", "--nj", 2)
    done = command("format_data", "--src", folder, "--out", out, *skip, bound=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"1 utterances left out: {out / 'skipped'} says why" in done.stdout
    assert list(read_skipped(out)) == utts


def test_a_list_without_permission(corpus, tmp_path, command):
    folder = tmp_path / "data"
    damage_corpus(corpus, folder, "text_crlf")
    (folder / "text").chmod(0)
    done = command("validate_data", folder, bound=True)
    if done.returncode == 0:
        pytest.skip("this user may read every file")
    assert (
        done.stderr == f"validate_data: error: {folder / 'text'}: Permission denied: make it, "
        "or correct its path\n"
    )


def test_command(corpus, tmp_path, monkeypatch, capsys):
    argv = ["x", "--src", corpus, "--out", tmp_path / "d", "--kinds", "nan", "unsorted"]
    monkeypatch.setattr("sys.argv", [*map(str, argv), "--seed", "3"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(tmp_path / "d" / k) for k in argv[6:]
    ]
    monkeypatch.setattr("sys.argv", ["x", "--table"])
    main()
    assert capsys.readouterr().out == kinds_table()
    monkeypatch.setattr("sys.argv", ["x", "--src", str(corpus)])
    with pytest.raises(InputError, match="--src and --out"):
        main()
    with pytest.raises(InputError, match="there is no rain"):
        damage_corpus(corpus, tmp_path / "e", "rain")
    with pytest.raises(InputError, match="--utterances 5: from 1 to the 4"):
        damage_corpus(corpus, tmp_path / "e", "nan", 5)


def test_draws_depend_on_the_seed(corpus, tmp_path):
    drawn = [damage_corpus(corpus, tmp_path / f"{i}", "nan", 2, seed=i // 2) for i in range(20)]
    assert drawn[::2] == drawn[1::2]
    assert len({tuple(utts) for utts in drawn}) > 2
