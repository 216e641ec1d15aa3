#!/usr/bin/env bash
# Lint, then all tests. Sets posinv up first, which takes a second where it has been done.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/setup.sh --tests
# shellcheck disable=SC1091
. tools/activate_python.sh

# Small models gain nothing from threads, and lose much where several share a processor.
export OMP_NUM_THREADS=1

echo "test: ruff"
ruff check .
ruff format --check .
echo "test: shellcheck"
git ls-files -z '*.sh' .ci/run | while IFS= read -r -d '' file; do
    # Recipes link to their template's scripts, which are checked where they are.
    [ -L "$file" ] || printf '%s\0' "$file"
done | xargs -0 shellcheck -x -P egs/TEMPLATE
echo "test: pytest"
# The recipes, which take longest, come first.
exec python3 -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
