"""ESPnet trainings (egs/TEMPLATE/scripts/train.sh): kept, resumed, refused."""

import pytest

TRAIN = """
for file in options records jobs train; do . "$scripts/$file.sh"; done
. ./path.sh
cmd_backend=local num_nodes=1 python=python3
opt ngpu 0 "GPUs"
opt name "a b" "a name"
opt conf "max_epoch: 2" "the configuration"
parse_options "$@"
echo "$name" > input
echo "$conf" > "a conf.yaml"
train exp/x input "a conf.yaml" -- bash -c 'echo run >> runs; [ ! -e broken ]' _ --lr $((ngpu > 5))
"""


@pytest.fixture
def train(bash):
    """Run a training with these options."""

    def run(*args):
        return bash(TRAIN, *args)

    run.folder = bash.folder
    return run


def test_train_once(train):
    runs = train.folder / "runs"
    assert "exp/x: trained in 0 s" in train().stdout
    record = (train.folder / "exp/x/run.sh").read_text()
    assert "input" in record
    again = train()
    assert "finished already" in again.stdout
    assert runs.read_text() == "run\n"
    # Another number of GPUs is no other training; other inputs are.
    assert train("--ngpu", "1").returncode == 0
    assert runs.read_text() == "run\n"


@pytest.mark.parametrize(
    "args, difference",
    [
        (["--name", "other"], "input: another content there, changed now"),
        (["--ngpu", "6"], "--lr: 0 there, 1 now"),
        (["--conf", "max_epoch: 1"], "max_epoch: 2 there, 1 now"),
        (["--conf", "{max_epoch: 3, optim: {lr: 1}}"], "optim.lr: none there, 1 now"),
    ],
)
def test_another_training_is_refused(train, args, difference):
    assert train().returncode == 0
    other = train(*args)
    assert other.returncode != 0
    [line] = other.stderr.splitlines()
    assert "exp/x was made by another training: " in line
    assert difference in line
    assert "remove it, or choose another --expdir" in line
    assert (train.folder / "runs").read_text() == "run\n"
    assert "finished already" in train().stdout


def test_more_epochs_go_on(train):
    assert train().returncode == 0
    (train.folder / "exp/x/model").mkdir()  # exported after the first epochs
    more = train("--conf", "max_epoch: 3")
    assert more.returncode == 0, more.stderr
    assert "exp/x: max_epoch has grown to 3: the training goes on" in more.stdout
    assert "exp/x: resuming" in more.stdout
    assert not (train.folder / "exp/x/model").exists()
    assert (train.folder / "runs").read_text() == "run\nrun\n"
    assert "finished already" in train("--conf", "max_epoch: 3").stdout


HEADS = """
for file in options records jobs train; do . "$scripts/$file.sh"; done
. ./path.sh
cmd_backend=local num_nodes=1 ngpu=0 python=python3
touch input
train exp/x input -- bash -c 'echo run >> runs' _ --lr 1 "$@" --all --seed 1
"""


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (["--head", "b", "--lr", "2"], "--head a: none now: the training goes on"),
        (["--head", "a", "--lr", "1"], "--head b: none now: the training goes on"),
        (
            ["--head", "c", "--head", "b", "--lr", "2", "--head", "a", "--lr", "1"],
            "--head c: a head now: the training goes on",
        ),
    ],
)
def test_heads_can_come_and_go(bash, heads, said):
    """Those that stay don't depend on them."""
    both = ["--head", "a", "--lr", "1", "--head", "b", "--lr", "2"]
    assert bash(HEADS, *both).returncode == 0
    other = bash(HEADS, *heads)
    assert other.returncode == 0, other.stderr
    assert f"exp/x: {said}" in other.stdout
    assert (bash.folder / "runs").read_text() == "run\nrun\n"


def test_a_head_that_changes_is_named(bash):
    assert bash(HEADS, "--head", "a", "--lr", "1", "--head", "b", "--lr", "2").returncode == 0
    other = bash(HEADS, "--head", "a", "--lr", "1", "--head", "b", "--lr", "3", "--clip", "1")
    [line] = other.stderr.splitlines()
    difference = "--head b --clip: none there, 1 now; --head b --lr: 2 there, 3 now: remove it"
    assert f"exp/x was made by another training: {difference}" in line
    assert (bash.folder / "runs").read_text() == "run\n"


def test_comments_do_not_make_another_training(train):
    assert train().returncode == 0
    again = train("--conf", "max_epoch: 2  # as before")
    assert again.returncode == 0, again.stderr
    assert "exp/x: comments or the order of options changed, no value: it goes on" in again.stdout


def test_results_of_changed_inputs_are_refused(bash):
    script = """
    for file in options records; do . "$scripts/$file.sh"; done
    qbe=false
    mkdir -p "exp x/a"
    echo 1 > "in put"
    record_inputs "exp x/a/scores.json" "in put"
    check_records "exp x"
    echo same
    echo 2 > "in put"
    check_records "exp x"
    """
    done = bash(script)
    assert done.stdout == "same\n"
    [line] = done.stderr.splitlines()
    assert line.startswith("error: exp x/a/scores.json: in put changed after this was made: run")


def test_train_resumes_after_a_failure(train):
    (train.folder / "broken").touch()
    assert train().returncode != 0
    (train.folder / "broken").unlink()
    again = train()
    assert again.returncode == 0
    assert "exp/x: resuming" in again.stdout
    assert (train.folder / "runs").read_text() == "run\nrun\n"
    assert len(list((train.folder / "exp/x").glob("train*.log"))) == 2


def test_train_wants_its_inputs(bash):
    done = bash(TRAIN.replace("exp/x input", "exp/y 'no file'"))
    assert done.returncode != 0
    assert "no file" in done.stderr
    assert not (bash.folder / "exp/y").exists()
