#!/usr/bin/env bash
# Make the Python environment that the recipes and the tests run in.
set -euo pipefail
unset CDPATH

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=${tools%/*}
venv=$tools/venv
state=$tools/.setup
log=$tools/setup.log
activate=$tools/activate_python.sh
wanted_python='>=3.12,<3.14'

usage() {
    cat <<'EOF'
Usage: tools/setup.sh [options]
Install posinv, ESPnet and torch, at the versions in tools/constraints.txt, into the virtual
environment tools/venv, and check them. What is there already is kept, so this can be run again
after any failure, and at any time. The options given are kept for later runs, until --clean.
  --python PATH         install into the environment of this Python (3.12 or 3.13) instead; a torch
                        that is there is kept
  --torch-backend NAME  the build of torch: cpu, cu130, auto, ... as uv has it
                        (default: the package index's)
  --tests               install what test/run.sh needs, too
  --unpinned            install the newest versions that setup.cfg allows
  --clean               begin anew: remove tools/venv and forget the options given before
  --help                print this and exit
To see what is installed: tools/check_install.py, which this ends with.
EOF
}

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

given_python='' given_backend='' given_tests='' given_unpinned='' clean=''
while [ $# -gt 0 ]; do
    case $1 in
        --python | --torch-backend) [ -n "${2:-}" ] || die "$1 needs a value; see --help" ;;&
        --python) given_python=$2; shift ;;
        --torch-backend) given_backend=$2; shift ;;
        --tests) given_tests=1 ;;
        --unpinned) given_unpinned=1 ;;
        --clean) clean=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; die "unknown option: $1" ;;
    esac
    shift
done
if [ -n "$given_python" ]; then
    python=$(command -v "$given_python") || die "--python $given_python: no such program"
    given_python=$(realpath -s "$python")
fi

# ----------------------------------------------------------------------- what there is already
# The options of earlier runs, and those given now.
own_python='' torch_backend='' tests='' unpinned=''
load_options() {
    if [ -z "$clean" ] && [ -e "$state/options" ]; then
        # shellcheck source=/dev/null
        . "$state/options"
    fi
    own_python=${given_python:-$own_python}
    torch_backend=${given_backend:-$torch_backend}
    tests=${given_tests:-$tests}
    unpinned=${given_unpinned:-$unpinned}
    python=${own_python:-$venv/bin/python}
}
# What posinv's environment follows from, and what is in it.
inventory() {
    echo "$root $python $torch_backend $tests $unpinned" \
        "$(cat "$root/setup.cfg" "$tools/constraints.txt" | cksum)"
    "$python" -I "$tools/check_install.py" --packages
}
complete() {
    [ -z "$clean$given_unpinned" ] && [ -e "$activate" ] && [ -e "$state/installed" ] \
        && [ "$(inventory 2> /dev/null)" = "$(cat "$state/installed")" ]
}

load_options
if complete; then
    say "complete: $python"
    exit 0
fi

[ -n "$own_python" ] || [ ! -L "$venv" ] || die "$venv is a link, and set-up would replace what it leads to:" \
    "remove the link, or install into that environment: --python $venv/bin/python"
{ mkdir -p "$state" && : >> "$state/lock" && : > "$log" && [ -w "$tools" ]; } 2> /dev/null \
    || die "cannot write to $tools: make it and what is in it writable, or clone posinv elsewhere"
exec 9>> "$state/lock"
# flock is no part of macOS.
if command -v flock > /dev/null && ! flock --nonblock 9; then
    say "waiting for another set-up of this checkout to end"
    flock 9
    load_options
    if complete; then
        say "complete: $python"
        exit 0
    fi
fi

if [ -n "$clean" ]; then
    rm -f "$activate" "$venv/made-for"
    rm -rf "$venv"
    find "$state" -mindepth 1 ! -path "$state/lock" -delete
fi

# -------------------------------------------------------------------------------------- Python
# usable PYTHON: whether posinv runs on it; $base is then the Python that it comes from, or else
# $reason is why not.
usable() {
    local said
    if said=$("$1" - 2>&1 <<'EOF'
import sys
if not (3, 12) <= sys.version_info[:2] < (3, 14):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
import sysconfig
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("is a free-threaded build")
for name in ("ctypes", "lzma", "ssl"):
    try:
        __import__(name)
    except ImportError:
        sys.exit("was built without " + name)
print(sys._base_executable)
EOF
    ); then
        base=$(tail -n 1 <<< "$said")
    else
        reason=$(head -n 1 <<< "$said")
        return 1
    fi
}

# find_python: set $base to the first usable Python on the PATH or in pyenv's versions. If there is
# none, $base is empty, and $why says what is wrong with the first python3.
find_python() {
    local name candidate
    local -a candidates=()
    for name in python3.13 python3.12 python3; do
        mapfile -t -O ${#candidates[@]} candidates < <(type -ap "$name")
    done
    mapfile -t -O ${#candidates[@]} candidates < <(
        printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python | sort -rV
    )
    why=
    for candidate in "${candidates[@]}"; do
        if [ -x "$candidate" ] && [[ $candidate != "$venv"/* ]]; then
            if usable "$candidate"; then
                return
            fi
            if [ -z "$why" ] && [[ $candidate == */python3 ]]; then
                why=" ($candidate ${reason:-does not run})"
            fi
        fi
    done
    base=
}

base=''
if [ -n "$own_python" ]; then
    usable "$own_python" \
        || die "--python $own_python ${reason:-does not run}; posinv needs Python 3.12 or 3.13"
    "$own_python" -c '
import os, sys, sysconfig
outside = sys.prefix == sys.base_prefix
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(outside and os.path.exists(marker) or not os.access(sysconfig.get_path("purelib"), os.W_OK))
' || die "--python $own_python: its packages are not to be written to; make an environment of it:" \
        "$own_python -m venv DIR, then --python DIR/bin/python"
else
    find_python
fi

# shellcheck source=tools/uv.sh
. "$tools/uv.sh"
# shellcheck disable=SC2034  # read by find_uv
uv_log=$log
rm -rf "$state"/uv.??????  # of a run that was killed
find_uv ${own_python:+"$own_python"} ${base:+"$base"} python3
cache="pip's cache"
if [ -n "$uv" ]; then
    if [ -n "$torch_backend" ]; then
        "$uv" pip compile --torch-backend "$torch_backend" - < /dev/null > /dev/null 2>> "$log" \
            || die "--torch-backend $torch_backend: not one that uv knows; '$uv pip install --help' lists them"
    fi
    # A home that cannot be written.
    cache=$("$uv" cache dir)
    if ! mkdir -p "$cache" 2> /dev/null || ! [ -w "$cache" ]; then
        export UV_CACHE_DIR=$state/cache UV_PYTHON_INSTALL_DIR=$state/python
        cache=$UV_CACHE_DIR
        say "cannot write to uv's cache: using tools/.setup/cache"
    fi
elif [ -n "$torch_backend" ]; then
    die "--torch-backend needs uv, which is not on the PATH and could not be had with pip (see $log)"
fi

make_venv() {
    say "making the virtual environment tools/venv with ${base:-a Python that uv has or downloads}"
    if [ -n "$uv" ] \
        && "$uv" venv --quiet --clear --python "${base:-$wanted_python}" "$venv" >> "$log" 2>&1; then
        return
    fi
    [ -n "$base" ] || die "no Python 3.12 or 3.13 is here$why, and none could be downloaded" \
        "${uv:+by uv }(see $log): install one (apt-get install python3.12, pyenv install 3.12, conda" \
        "create -n posinv python=3.12) or uv, or say where one is: --python PATH"
    "$base" -m venv --clear "$venv" >> "$log" 2>&1 \
        || die "$base cannot make a virtual environment (see $log): install uv, or Python's venv" \
            "module (on Debian: apt-get install python3-venv); a full disk does this, too"
}
# From here on, what there was is no longer whole.
rm -f "$activate" "$state/installed"
if [ -z "$own_python" ]; then
    made_for="$root $torch_backend"
    if ! (usable "$python") || [ "$(cat "$venv/made-for" 2> /dev/null)" != "$made_for" ] \
        || { [ -z "$uv" ] && ! "$python" -m pip --version > /dev/null 2>&1; }; then
        make_venv
        echo "$made_for" > "$venv/made-for"
    fi
elif [ -z "$uv" ] && ! "$python" -m pip --version > /dev/null 2>&1; then
    die "--python $python has no pip, and there is no uv: run '$python -m ensurepip', or install uv"
fi
say "Python: $python ($("$python" --version)); installing with ${uv:-pip}"

# ------------------------------------------------------------------------------------ packages
pins=$tools/constraints.txt
[ -z "$unpinned" ] || pins=/dev/null
build=$torch_backend
if [ -n "$own_python" ]; then
    # A torch that its owner chose stays, if posinv can work with it; torchaudio must be of the
    # same build, which the version tells: 2.13.0+cpu.
    torch=$("$python" - "$root/setup.cfg" <<'EOF'
import re
import sys
from importlib import metadata

try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    sys.exit()
with open(sys.argv[1], encoding="utf-8") as file:
    wanted = re.search(r"^ +torch([<>=!][^ ]*)", file.read(), re.MULTILINE)[1]


def numbers(text):
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


holds = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "!=": lambda a, b: a != b}
for operator, limit in re.findall(r"([<>=!]+)([^,]+)", wanted):
    if not holds[operator](numbers(version), numbers(limit)):
        print(f"{version} is not one that posinv works with (torch{wanted})")
        break
else:
    print(version)
EOF
    )
    case $torch in
        *' '*)
            die "--python $python: torch $torch: install another there" \
                "($(grep '^torch==' "$tools/constraints.txt") is tested), or leave --python out"
            ;;
        ?*)
            say "torch $torch stays"
            { sed '/^torch==/d' "$pins"; echo "torch==$torch"; } > "$state/constraints.txt"
            pins=$state/constraints.txt
            if [ -z "$build" ] && [[ $torch == *+* ]]; then
                build=${torch#*+}
            fi
            ;;
    esac
fi

cd "$root"  # so that no path with spaces is needed where lists are split at spaces
pins=$(realpath --relative-to=. "$pins")
# install ARG ...: pip install, of uv or pip.
install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$python" --constraints "$pins" --build-constraints "$pins" \
            ${build:+--torch-backend "$build"} "$@"
    else
        PIP_BUILD_CONSTRAINT=$pins PIP_CONSTRAINT=$pins \
            "$python" -m pip --disable-pip-version-check install "$@"
    fi >> "$log" 2>&1
}
unreachable() {
    tail -n 40 "$log" | grep -qiE 'connection|error sending request|timed out|network was disabled'
}
# try_install ARG ...: install, from what was downloaded before if there is no network.
try_install() {
    install "$@" || { [ -n "$uv" ] && unreachable && install --offline "$@"; }
}
must_install() {  # must_install WHAT ARG ...
    local what=$1
    shift
    if try_install "$@"; then return; fi
    if grep -qi 'no space left' "$log"; then
        die "the disk is full: set-up takes 6 GB (2 GB with --torch-backend cpu) in $tools and in" \
            "$cache; make room and run this again"
    fi
    if unreachable; then
        die "$what: the package index${build:+, or that of PyTorch for its build $build,} cannot be" \
            "reached, and not all is in the cache: check the network (HTTPS_PROXY; for a mirror," \
            "UV_DEFAULT_INDEX or PIP_INDEX_URL) and run this again"
    fi
    tail -n 20 "$log" >&2
    die "$what could not be installed (see above and $log): run this again; if that does not help," \
        "with --clean"
}
# forget_damaged: make the installer believe that packages whose files are gone or changed are not
# there; whether there were any.
forget_damaged() {
    local -a damaged
    mapfile -t damaged < <("$python" -I "$tools/check_install.py" --forget-damaged)
    [ ${#damaged[@]} -gt 0 ] || return 1
    say "files are gone or changed; installing again: ${damaged[*]}"
    # uv's cache shares its files with the environment.
    [ -z "$uv" ] || "$uv" cache clean "${damaged[@]}" >> "$log" 2>&1
}
extras=espnet
[ -z "$tests" ] || extras=espnet,test
upgrade=()
[ -z "$given_unpinned" ] || upgrade=(--upgrade)
install_all() {
    must_install "posinv[$extras]" ${upgrade[@]+"${upgrade[@]}"} -e ".[$extras]" pip
    if [ -n "$tests" ]; then
        # The oracle of the DEMUCS separator. Its licence is CC BY-NC and its pinned dependencies
        # are those of 2020, so it is no dependency of posinv's.
        must_install denoiser --no-deps denoiser==0.1.5
    fi
}
forget_damaged || true
say "installing posinv[$extras] (what is said goes to tools/setup.log)"
install_all
if forget_damaged; then
    install_all
fi

if ! "$python" -c 'import pesq' 2> /dev/null && ! try_install pesq; then
    say "PESQ could not be compiled; tables will have no PESQ column (see tools/setup.log)"
fi

"$python" "$tools/check_install.py" \
    || die "posinv is not whole: do what the lines marked ✗ or BAD say, and run this again"

# uv leaves no bytecode, and Python writes none where PYTHONDONTWRITEBYTECODE is set, as in many
# containers: each start of a recipe's command would compile torch, transformers and ESPnet anew.
say "compiling the modules that recipes import"
env -u PYTHONDONTWRITEBYTECODE "$python" - egs/TEMPLATE/scripts/fork_server.py >> "$log" 2>&1 <<'EOF' \
    || say "not all could be compiled, so commands start slowly (see tools/setup.log)"
import importlib
import runpy
import sys

for module in runpy.run_path(sys.argv[1])["MODULES"]:
    importlib.import_module(module)
EOF

# Written last: they are there when the environment is whole. path.sh looks at the first line and
# the age of activate_python.sh.
printf '%s=%q\n' own_python "$own_python" torch_backend "$torch_backend" tests "$tests" \
    unpinned "$unpinned" > "$state/options"
inventory > "$state/installed"
cat > "$activate.new" <<EOF
# For $tools
# Made by tools/setup.sh: the Python of the recipes.
export PATH=$(printf '%q' "$(dirname "$python")"):\$PATH
EOF
mv "$activate.new" "$activate"
say "done; to use it: . tools/activate_python.sh"
