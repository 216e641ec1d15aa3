#!/usr/bin/env bash
# Lint, then all tests. Sets posinv up first where that has not been done. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -e tools/activate_python.sh ] || [ setup.cfg -nt tools/activate_python.sh ]; then
    tools/setup.sh
fi
# shellcheck disable=SC1091
. tools/activate_python.sh

# The oracle of posinv/separator.py. Only tests use it, its licence is CC BY-NC, and its pinned
# dependencies are those of 2020, so it is no dependency of posinv's.
python3 -c 'import denoiser' 2> /dev/null \
    || python3 -m pip install -q --disable-pip-version-check --no-deps denoiser==0.1.5

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
