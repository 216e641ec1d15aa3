"""What tools/setup.sh decides, with a uv that installs nothing, and no network."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    "bash cat cksum dirname env find flock grep head mkdir mktemp mv realpath rm sed sort tail"
)
UV = """#!/usr/bin/env bash
echo "$*" >> "$UV_CALLS"
case "$*" in
    "pip install --help") echo --torch-backend ;;
    "cache dir") echo "$HOME/cache" ;;
    venv*) [[ $* != *\\>=* ]] && "$REAL_PYTHON" -m venv --without-pip --clear "${@: -1}" ;;
    pip\\ install*) echo "$UV_SAYS" >&2; exit "$UV_STATUS" ;;
esac
"""
OLD = """#!/usr/bin/env bash
exec "$REAL_PYTHON" -c 'import sys; sys.version_info = (3, 11, 7); exec(sys.stdin.read())'
"""
SHIM = """#!/usr/bin/env bash
echo "pyenv: ${0##*/}: command not found" >&2
exit 127
"""
GOOD = '#!/usr/bin/env bash\nexec "$REAL_PYTHON" "$@"\n'


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A copy of what set-up reads, and a PATH with hardly anything on it."""

    def __init__(self, top):
        self.top = top
        self.root = top / "a pläce" / "posinv"
        self.bin = top / "bin"
        (self.root / "tools").mkdir(parents=True)
        for name in ("setup.sh", "uv.sh", "constraints.txt", "check_install.py"):
            shutil.copy(ROOT / "tools" / name, self.root / "tools")
        shutil.copy(ROOT / "setup.cfg", self.root)
        check = self.root / "tools" / "check_install.py"
        text = check.read_text().replace("\nCHECKS = (", "\nCHECKS = ()\nNOT_HERE = (")
        check.write_text(text)
        self.bin.mkdir()
        for name in PROGRAMS.split():
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)
        script(self.bin / "uv", UV)
        (top / "home").mkdir()
        self.calls = top / "calls"
        self.calls.touch()

    def python(self, name, text):
        script(self.bin / name, text)

    def setup(self, *options, status=0, says="", **kwargs):
        self.calls.write_text("")
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.top / "home"),
            "LC_ALL": "C",
            "REAL_PYTHON": sys.executable,
            "UV_CALLS": str(self.calls),
            "UV_STATUS": str(status),
            "UV_SAYS": says,
        }
        return subprocess.run(
            [self.root / "tools" / "setup.sh", *map(str, options)],
            env=environment,
            text=True,
            capture_output=True,
            encoding="utf-8",
            **kwargs,
        )

    def installed(self, *options, **kwargs):
        done = self.setup(*options, **kwargs)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "setup: done; to use it: . tools/activate_python.sh"
        return done.stdout

    def fails(self, *options, **kwargs):
        """Return the error, which must be the last line; nothing may look whole."""
        done = self.setup(*options, **kwargs)
        assert done.returncode == 1
        assert not (self.root / "tools" / "activate_python.sh").exists()
        error = done.stderr.splitlines()[-1]
        assert error.startswith("setup: error: ")
        return error.removeprefix("setup: error: ")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_options(checkout):
    done = checkout.setup("--help")
    assert done.returncode == 0
    for option in ("--python PATH", "--torch-backend NAME", "--tests", "--unpinned", "--clean"):
        assert f"\n  {option} " in done.stdout
    assert checkout.fails("--pyton", "x") == "unknown option: --pyton"
    assert checkout.fails("--python") == "--python needs a value; see --help"
    assert checkout.fails("--torch-backend", "") == "--torch-backend needs a value; see --help"
    assert checkout.fails("--python", "/no/python") == "--python /no/python: no such program"
    assert checkout.calls.read_text() == ""


def test_what_is_no_python_for_posinv(checkout):
    checkout.python("old", OLD)
    error = checkout.fails("--python", checkout.bin / "old")
    assert error.endswith("old is Python 3.11; posinv needs Python 3.12 or 3.13")
    checkout.python("shim", SHIM)
    assert "shim pyenv: shim: command not found;" in checkout.fails("--python", "shim")
    checkout.python("python3", OLD)
    checkout.python("python3.12", SHIM)
    error = checkout.fails()
    assert f"no Python 3.12 or 3.13 is here ({checkout.bin / 'python3'} is Python 3.11)" in error
    assert "--python PATH" in error
    assert not (checkout.root / "tools" / "venv").exists()


def test_an_environment_behind_a_link_is_not_replaced(checkout):
    elsewhere = checkout.top / "venv"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    venv = checkout.root / "tools" / "venv"
    venv.symlink_to(elsewhere)
    assert checkout.fails().startswith(f"{venv} is a link, and set-up would replace what it leads")
    assert (elsewhere / "mine").exists()
    assert checkout.calls.read_text() == ""


def test_first_python_that_runs_is_taken(checkout):
    checkout.python("python3.13", SHIM)
    checkout.python("python3.12", OLD)
    checkout.python("python3", GOOD)
    checkout.installed()
    base = Path(sys._base_executable)
    assert f"venv --quiet --clear --python {base} " in checkout.calls.read_text()
    checkout.python("python3.12", GOOD)
    checkout.python("python3", '#!/usr/bin/env bash\n: > "$HOME/asked"\n' + GOOD)
    checkout.installed("--clean")
    assert not (checkout.top / "home" / "asked").exists()


def test_pyenv_versions(checkout):
    checkout.python("python3", SHIM)
    versions = checkout.top / "home" / ".pyenv" / "versions"
    script(versions / "3.9.18" / "bin" / "python", OLD)
    assert "no Python 3.12 or 3.13 is here" in checkout.fails()
    script(versions / "3.12.1" / "bin" / "python", GOOD)
    checkout.installed()


def test_pins_extras_and_options_that_are_kept(checkout):
    checkout.python("python3", GOOD)
    checkout.installed("--torch-backend", "cpu")
    calls = checkout.calls.read_text()
    pins = "--constraints tools/constraints.txt --build-constraints tools/constraints.txt"
    assert f"{pins} --torch-backend cpu -e .[espnet] pip\n" in calls
    assert "denoiser" not in calls
    checkout.installed("--tests")
    calls = checkout.calls.read_text()
    assert f"{pins} --torch-backend cpu -e .[espnet,test] pip\n" in calls
    assert "--no-deps denoiser==" in calls
    assert "venv" not in calls.replace("tools/venv", "")
    checkout.installed("--unpinned")
    assert "constraints.txt" not in checkout.calls.read_text()
    checkout.installed("--clean")
    calls = checkout.calls.read_text()
    assert f"{pins} -e .[espnet] pip\n" in calls
    assert calls.splitlines()[1].startswith("cache dir")
    assert "venv --quiet" in calls


def test_complete_returns_at_once_until_something_changes(checkout):
    checkout.python("python3", GOOD)
    checkout.installed()

    def complete():
        done = checkout.setup()
        assert done.returncode == 0
        whole = done.stdout.startswith("setup: complete: ")
        assert whole == (checkout.calls.read_text() == "")
        return whole

    assert complete()
    with (checkout.root / "tools" / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert not complete()
    assert complete()
    [site] = (checkout.root / "tools" / "venv" / "lib").glob("python3*/site-packages")
    folder = site / "some_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (folder / "RECORD").write_text("some_package.py,sha256=x,5\n")
    (site / "some_package.py").write_text("a = 1")
    assert not complete()
    assert complete()
    (site / "some_package.py").write_text("")
    done = checkout.setup()
    assert "installing again: some-package\n" in done.stdout
    assert "cache clean some-package\n" in checkout.calls.read_text()
    assert complete()
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root = moved
    assert "making the virtual environment" in checkout.installed()


def test_failed_installation_is_not_taken_for_whole(checkout):
    checkout.python("python3", GOOD)
    error = checkout.fails(status=2, says="error sending request for url")
    assert "the package index cannot be reached" in error
    assert "--offline" in checkout.calls.read_text()
    assert "disk is full" in checkout.fails(status=2, says="No space left on device (os error 28)")
    error = checkout.fails(status=2, says="some package is broken")
    assert "tools/setup.log): run this again; if that does not help, with --clean" in error
    checkout.installed()
    with (checkout.root / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    checkout.fails(status=2)  # what was whole is so no longer


def test_own_torch(checkout):
    environment = checkout.top / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    [site] = (environment / "lib").glob("python3*/site-packages")

    def put(version):
        for old in site.glob("torch-*"):
            shutil.rmtree(old)
        folder = site / f"torch-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        (folder / "RECORD").write_text("")

    for version in ("2.10.0", "2.12.1", "2.15.0+cu130"):
        put(version)
        error = checkout.fails("--python", python)
        assert f"torch {version} is not one that posinv works with (torch>=2.11," in error
    put("2.11.0+cu126")
    checkout.installed("--python", python)
    assert "--torch-backend cu126" in checkout.calls.read_text()
    pins = (checkout.root / "tools" / ".setup" / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if re.match("torch=", pin)] == ["torch==2.11.0+cu126"]
    assert str(python) in checkout.setup().stdout  # kept


def test_folder_that_cannot_be_written():
    # As another user: root may write to any folder. That user cannot enter pytest's folders.
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        checkout = Checkout(Path(top))
        checkout.python("python3", GOOD)
        tools = checkout.root / "tools"
        tools.chmod(0o555)
        user = {"user": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        error = checkout.fails(**user)
        tools.chmod(0o755)
    assert error.startswith(f"cannot write to {tools}: make it")


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_constraints_satisfy_setup_cfg(python):
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    wanted = [
        Requirement(text)
        for line in "\n".join(lines).splitlines()
        if (text := line.split(" #")[0].strip()) and not text.startswith("#")
    ]
    assert len(wanted) > 30
    pinned = {}
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                [specifier] = pin.specifier
                assert specifier.operator == "=="
                assert "+" not in specifier.version, line
                assert pin.name not in pinned
                pinned[pin.name] = specifier.version
    system = ("nvidia", "cuda", "triton")
    assert not [name for name in pinned if name.startswith(system)]
    for requirement in wanted:
        name = requirement.name.replace("_", "-").lower()
        if name != "posinv" and not name.startswith(system):
            assert requirement.specifier.contains(pinned[name]), requirement


def test_python_versions_agree():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    text = (ROOT / "tools" / "setup.sh").read_text()
    wanted = re.search("^wanted_python='(.*)'$", text, re.MULTILINE)[1]
    assert SpecifierSet(wanted) == SpecifierSet(config["options"]["python_requires"])
    assert "(3, 12) <= sys.version_info[:2] < (3, 14)" in text


def test_package_page():
    """PACKAGE.md: all links are absolute, as the package index needs, and the example runs."""
    text = (ROOT / "PACKAGE.md").read_text()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    [example] = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(example, names)
    assert names["x"].grad.abs().sum() > 0


def test_path_sh(tmp_path):
    """path.sh runs set-up if there is none yet, if the pins changed, and if the checkout moved."""
    tools = tmp_path / "a checkout" / "tools"
    recipe = tools.parent / "egs" / "corpus" / "task"
    recipe.mkdir(parents=True)
    (tools.parent / "setup.cfg").touch()
    setup = 'cd "$(dirname "$0")"\necho set up\necho "# For $PWD" > activate_python.sh\n'
    script(tools / "setup.sh", f"#!/usr/bin/env bash\n{setup}")
    pins = tools / "constraints.txt"
    pins.touch()

    def said(folder):
        command = f"set -euo pipefail; . '{ROOT}/egs/TEMPLATE/path.sh'"
        return subprocess.check_output(["bash", "-c", command], cwd=folder, text=True)

    assert said(recipe) == "set up\n"
    assert said(recipe) == ""
    later = (tools / "activate_python.sh").stat().st_mtime + 5
    os.utime(pins, (later, later))
    assert said(recipe) == "set up\n"
    os.utime(pins, (0, 0))
    assert said(recipe) == ""
    moved = tmp_path / "moved"
    tools.parent.rename(moved)
    assert said(moved / "egs" / "corpus" / "task") == "set up\n"
