#!/usr/bin/env bash
# Make the Python environment that the recipes and the tests run in.
set -euo pipefail

TORCH_VERSION=2.13.0
ESPNET_VERSION=202511

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/tools/venv
python=

usage() {
    cat <<EOF
Usage: tools/setup.sh [options]
Install torch, ESPnet and posinv. What is there already is left as it is, so the script can be
run again after a failure, and at any time.
  --python PATH   use this Python and install into its environment
                  (default: a virtual environment at tools/venv, made with python3)
  --torch VERSION install this version of torch when there is none (default: ${TORCH_VERSION})
  --help          print this and exit
EOF
}

log=$root/tools/setup.log

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --python) python=${2:?--python needs a path}; shift 2 ;;
        --torch) TORCH_VERSION=${2:?--torch needs a version}; shift 2 ;;
        --help) usage; exit 0 ;;
        *) usage >&2; die "unknown option: $1" ;;
    esac
done

if [ -n "$python" ]; then
    python=$(command -v "$python") || die "no such Python: $python"
    python=$(realpath -s "$python")
else
    python=$venv/bin/python
    if [ ! -x "$python" ] || ! "$python" -m pip --version > /dev/null 2>&1; then
        say "making a virtual environment in tools/venv"
        python3 -m venv --clear "$venv" || die "python3 -m venv failed (on Debian: apt-get install python3-venv)"
    fi
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || die "$python is $("$python" --version); posinv needs Python 3.11 or newer"
say "Python: $python ($("$python" --version))"

: > "$log"
# pip's remark that ESPnet wants an older setuptools is expected (see setup.cfg), so its messages
# are shown only when it fails.
pip_install() {
    "$python" -m pip --disable-pip-version-check install "$@" >> "$log" 2>&1
}
install() {
    pip_install "$@" || { tail -n 20 "$log" >&2; die "pip install $* failed; all it said is in $log"; }
}
version_of() {
    "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2> /dev/null || true
}
# Whether the environment holds all that posinv[$1] asks for (ESPnet and torch apart).
complete() {
    "$python" - "$1" <<'EOF'
import importlib.metadata as metadata
import sys

from packaging.requirements import Requirement

try:
    wanted = [Requirement(text) for text in metadata.requires("posinv")]
    environment = {"extra": sys.argv[1]}
    missing = [
        str(r)
        for r in wanted
        if (r.marker is None or r.marker.evaluate(environment))
        and not r.specifier.contains(metadata.version(r.name), prereleases=True)
    ]
except metadata.PackageNotFoundError:
    sys.exit(1)
sys.exit(bool(missing))
EOF
}

torch_version=$(version_of torch)
if [ -z "$torch_version" ]; then
    say "installing torch $TORCH_VERSION"
    install "torch==$TORCH_VERSION"
else
    say "torch $torch_version is there"
fi

if [ "$(version_of espnet)" != "$ESPNET_VERSION" ]; then
    say "installing ESPnet $ESPNET_VERSION (its dependencies come with posinv's)"
    install --no-deps "espnet==$ESPNET_VERSION"
else
    say "ESPnet $ESPNET_VERSION is there"
fi

# What setup.cfg asks for is recorded at installation, so a changed setup.cfg installs anew.
record=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/posinv-setup.cfg
if cmp -s "$root/setup.cfg" "$record" && [ "$(cat "$record.root" 2> /dev/null)" = "$root" ] \
    && complete test > /dev/null 2>&1; then
    say "posinv and its dependencies are there"
else
    say "installing posinv and its dependencies"
    install "setuptools>=77"
    install --no-build-isolation -e "${root}[test]"
    complete test || die "posinv's dependencies are still incomplete; what pip said is in $log"
    cp "$root/setup.cfg" "$record"
    echo "$root" > "$record.root"
fi

if [ -z "$(version_of pesq)" ]; then
    say "installing PESQ"
    pip_install "pesq>=0.0.4" \
        || say "PESQ could not be built (it needs a C compiler); tables will have no PESQ column"
fi

# torchaudio's compiled libraries link against CUDA; without it they stop 'import torchaudio',
# whose Python parts are all that ESPnet and posinv need.
"$python" - <<'EOF'
import importlib.util
import sysconfig
from pathlib import Path

import torch

if torch.version.cuda is None:
    libraries = Path(sysconfig.get_path("platlib"), "torchaudio", "lib")
    found = sorted(libraries.glob("*.so"))
    for library in found:
        library.rename(library.with_suffix(".so.needs-cuda"))
    if found:
        print(f"setup: torch has no CUDA: put {len(found)} CUDA libraries of torchaudio aside")
EOF

say "importing ESPnet's tasks"
"$python" 2>> "$log" - <<'EOF' || { tail -n 20 "$log" >&2; die "ESPnet's tasks can't be imported; see $log"; }
import importlib.metadata as metadata

import espnet2.tasks.asr
import espnet2.tasks.enh
import torch

versions = {
    name: metadata.version(name)
    for name in ("torch", "torchaudio", "espnet", "transformers", "posinv")
}
print("setup: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
print("setup: " + (f"GPUs: {torch.cuda.device_count()}" if torch.cuda.is_available() else "no GPU"))
EOF

# What path.sh sources. Written last: it is there when the environment is whole.
cat > "$root/tools/activate_python.sh" <<EOF
# Made by tools/setup.sh: the Python of the recipes.
export PATH=$(printf '%q' "$(dirname "$python")"):\$PATH
EOF
say "done"
