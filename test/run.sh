#!/usr/bin/env bash
# Lint, then all tests. Sets posinv up first where that has not been done. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -e tools/activate_python.sh ] || [ setup.cfg -nt tools/activate_python.sh ]; then
    tools/setup.sh
fi
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
exec python3 -m pytest "$@"
