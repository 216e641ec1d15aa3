"""Options of the recipes' scripts (egs/TEMPLATE/scripts/options.sh)."""

import pytest

OPTIONS = """
. "$scripts/options.sh"
last_stage=9
opt stage 1 "first stage" stage "$last_stage"
opt ngpu 0 "GPUs" integer
opt nj 1 "processes" positive
opt seeds "1 2" "random seeds" integers
opt snrs "" "SNRs" numbers
opt resample false "resample" one_of true false
opt conditions clean "test sets" some_of clean seen unseen
opt criteria "" "criteria" yaml_in conf
opt head "" "configuration" file
opt my_name "a b" "a name with spaces"
parse_options "$@"
"""


@pytest.fixture
def options(bash):
    """Run a script after the options above, with these arguments."""
    return lambda script, *args: bash(OPTIONS + script, *args)


@pytest.mark.parametrize(
    "args, stage_and_name",
    [
        ([], "1/a b"),
        (["--stage", "2", "--my_name", "c  d", "--stage", "3"], "3/c  d"),
        (["--stage=4", "--my-name=e=f"], "4/e=f"),
        (["--my_name="], "1/"),
    ],
)
def test_options(options, args, stage_and_name):
    assert options('echo "$stage/$my_name"', *args).stdout == f"{stage_and_name}\n"


def test_options_from_yaml(options, bash):
    (bash.folder / "my options.yaml").write_text("my-name: [x, y z]\nngpu: 2\n")
    done = options('echo "$my_name/$ngpu"', "--ngpu", "1", "--config", "my options.yaml")
    assert done.stdout == "x y z/2\n", done.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["--nam", "x"], "recipe: unknown option --nam; --help lists the options"),
        (["name"], "unexpected argument: name"),
        (["--my_name"], "option --my_name needs a value"),
        (["--config", "none.yaml"], "--config none.yaml: No such file or directory"),
        (["--stage", "4-6"], "--stage 4-6: must be the number of a stage, 1 to 9"),
        (["--stage", "0"], "--stage 0: must be the number of a stage, 1 to 9"),
        (["--stage", "12"], "--stage 12: the last stage is 9"),
        (["--ngpu", "two"], "--ngpu two: must be a whole number"),
        (["--ngpu", ""], "--ngpu : must be a whole number"),
        (["--nj", "0"], "--nj 0: must be a whole number above 0"),
        (["--seeds", "1 x"], "--seeds 1 x: x is not a whole number"),
        (["--seeds", ""], "--seeds : must be whole numbers"),
        (["--snrs", "5 1O"], "--snrs 5 1O: 1O is not a number"),
        (["--resample", "yes"], "--resample yes: must be one of: true false"),
        (["--resample", "true false"], "must be one of: true false"),
        (["--resample", ""], "must be one of: true false"),
        (["--conditions", "clean loud"], "there is no loud; there are: clean seen unseen"),
        (["--criteria", "ssl_mze"], "conf/ssl_mze.yaml: not found: the configuration of"),
        (["--head", "none.yaml"], "--head none.yaml: no such file"),
    ],
)
def test_bad_options(options, args, message):
    done = options("echo reached", *args)
    assert done.returncode != 0
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert message in line


def test_good_values(options, bash):
    (bash.folder / "conf").mkdir()
    (bash.folder / "conf/a.yaml").touch()
    values = ["--snrs", "-5 .5 1e-3 20", "--conditions", "", "--criteria", "a", "--head", "conf"]
    done = options("echo reached", *values, "--stage", "9", "--seeds", "7", "--ngpu", "08")
    assert done.stdout == "reached\n", done.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("nam: 1", "o.yaml: unknown option --nam"),
        ("my_name: {a: 1}", "my_name: must be a value or a list"),
        ("- my_name", "must be a mapping of option names"),
        ("my_name: [", "not valid YAML"),
        ("nj: many", "--nj many: must be a whole number above 0"),
    ],
)
def test_bad_yaml_options(options, bash, text, message):
    (bash.folder / "o.yaml").write_text(text)
    done = options("echo reached", "--config", "o.yaml")
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_prints_each_option_with_its_default(options, asked):
    done = options("echo reached", "--stage", "4", asked)
    assert done.returncode == 0
    assert "reached" not in done.stdout
    for line in (
        "--stage ",
        "first stage (default: 4)",
        "resample: one of true false (default: false)",
        "test sets: of clean seen unseen (default: clean)",
        "SNRs (default: none)",
        "--config",
    ):
        assert line in done.stdout
