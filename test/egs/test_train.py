"""ESPnet trainings (egs/TEMPLATE/scripts/train.sh): kept, resumed, refused."""

import pytest

TRAIN = """
for file in options jobs train; do . "$scripts/$file.sh"; done
cmd_backend=local num_nodes=1
opt ngpu 0 "GPUs"
opt name "a b" "a name"
parse_options "$@"
echo "$name" > input
train exp/x input -- bash -c 'echo run >> runs; [ ! -e broken ]' _
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
    other = train("--name", "other")
    assert other.returncode != 0
    assert "made by another command or from other inputs" in other.stderr
    assert runs.read_text() == "run\n"


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
