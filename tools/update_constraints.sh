#!/usr/bin/env bash
# Write tools/constraints.txt anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'EOF'
Usage: tools/update_constraints.sh [--check]
Write tools/constraints.txt: the newest versions of everything that setup.cfg asks for, all extras
included, that go together on Python 3.12 and 3.13. Run the tests, then commit it.
  --check  only tell whether there are such versions, and which differ from tools/constraints.txt
  --help   print this and exit
EOF
}
die() { echo "update_constraints: error: $*" >&2; exit 1; }

check=
while [ $# -gt 0 ]; do
    case $1 in
        --check) check=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; die "unknown option: $1" ;;
    esac
done

# shellcheck source=tools/uv.sh
. tools/uv.sh
find_uv python3
[ -n "$uv" ] || die "uv is not on the PATH and could not be had from the package index (see 'pip install uv')"

new=$(mktemp)
trap 'rm -f "$new" "$new.all"' EXIT
# Beside setup.cfg's: pip and uv, which tools/setup.sh installs, and the torch that the results in
# egs/ were made with.
also=(pip uv)
[ -n "$check" ] || also+=("torch==2.13.0")
printf '%s\n' "${also[@]}" | "$uv" pip compile --quiet --universal --python-version 3.12 --all-extras \
    --no-annotate --no-header setup.cfg - > "$new.all" \
    || die "setup.cfg's requirements have no solution in the package index today (see above)"
# CUDA's packages and Triton are left out: which of them are right depends on the build of torch.
{
    echo "# The versions that posinv is tested with. Made by tools/update_constraints.sh."
    grep -vE '^(nvidia|cuda|triton)([-_=]|$)' "$new.all"
} > "$new"

if [ -n "$check" ]; then
    echo "update_constraints: the newest versions go together"
    diff tools/constraints.txt "$new" | sed -n 's/^>/update_constraints: newer:/p'
else
    cp "$new" tools/constraints.txt
    echo "update_constraints: tools/constraints.txt has $(grep -cv '^#' "$new") packages"
fi
