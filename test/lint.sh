#!/usr/bin/env bash
# The lint: ruff, shellcheck and mypy. test/run.sh and pre-commit both run this script.
# Sets posinv up first, which takes a second where it has been done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/setup.sh --tests
# shellcheck disable=SC1091
. tools/activate_python.sh

echo "lint: ruff"
ruff check .
ruff format --check .
echo "lint: shellcheck"
git ls-files -z '*.sh' .ci/run | while IFS= read -r -d '' file; do
    # Recipes link to their template's scripts, which are checked where they are.
    [ -L "$file" ] || printf '%s\0' "$file"
done | xargs -0 shellcheck -x -P egs/TEMPLATE
echo "lint: mypy"
mypy
