"""Stages of a recipe (egs/TEMPLATE/scripts/stages.sh), with the jobs in them."""

import re

import pytest

STAGES = """
for file in options stages jobs; do . "$scripts/$file.sh"; done
opt stage 1 "first stage"
opt stop_stage 4 "last stage"
opt skip_stages "" "stages to skip"
opt skip_train false "skip training"
opt skip_eval false "skip evaluation"
opt train_nj 2 "jobs"
expdir="an exp"
opt number many "an option that stages.sh has a variable of"
parse_options "$@"
job() { sleep "$2"; echo did "$1"; }
if begin_stage 1 "a title"; then
    echo "did one, $number"
    end_stage
fi
if begin_stage 2 "trains" train; then
    queue job two 1
fi
if begin_stage 3 "trains, too" train; then
    queue job three 4
fi
end_stage
if begin_stage 4 "evaluates" eval; then
    [ ! -e broken ] || { false; echo went on; }
    echo did four
    end_stage
fi
end_recipe
echo end
"""
NUMBERS = ("one", "two", "three", "four")


@pytest.fixture
def stages(bash):
    """Run the stages with these arguments; returns the process and which of them ran."""

    def run(*args):
        done = bash(STAGES, *args)
        return done, [number for number in NUMBERS if f"did {number}" in done.stdout]

    run.folder = bash.folder
    return run


def test_all_stages(stages):
    done, ran = stages()
    assert ran == list(NUMBERS)
    assert "did one, many" in done.stdout
    lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if "stage" in line]
    record = [line.split("\t") for line in (stages.folder / "an exp/stages.tsv").open()]
    assert [row[:2] for row in record] == [
        ["stage", "title"],
        ["1", "a title"],
        ["2", "trains"],
        ["3", "trains, too"],
        ["4", "evaluates"],
    ]
    times = r"all done in \d+ s; stages 1: \d+ s, 2: \d+ s, 3: \d+ s, 4: \d+ s"
    assert re.fullmatch(times, lines.pop())
    # Stages 2 and 3 run at the same time; the time of each ends with its own job.
    assert lines[:5] == [
        "stage 1: a title",
        "stage 1: done in 0 s",
        "stage 2: trains",
        "stage 3: trains, too",
        lines[4],
    ]
    assert lines[4] in ("stage 2: done in 1 s", "stage 2: done in 2 s")
    assert lines[5] in ("stage 3: done in 4 s", "stage 3: done in 5 s")


@pytest.mark.parametrize(
    "args, expected, said",
    [
        (["--stage", "3"], ["three", "four"], ""),
        (["--stop-stage", "1"], ["one"], ""),
        (["--skip_stages", "1 3"], ["two", "four"], "stage 1: a title: skipped (--skip_stages)"),
        (["--skip_train", "true"], ["one", "four"], "stage 2: trains: skipped (--skip_train)"),
        (["--skip_eval", "true"], list(NUMBERS[:3]), "stage 4: evaluates: skipped (--skip_eval)"),
    ],
)
def test_some_stages(stages, args, expected, said):
    done, ran = stages(*args)
    assert ran == expected
    assert said in done.stdout
    assert done.stdout.endswith("end\n")


def test_a_failing_stage_stops_the_recipe(stages):
    (stages.folder / "broken").touch()
    done, ran = stages()
    assert done.returncode != 0
    assert ran == list(NUMBERS[:3])
    assert "went on" not in done.stdout
    assert "end\n" not in done.stdout
