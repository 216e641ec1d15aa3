#!/usr/bin/env bash
# The lint, then all tests. Arguments go to pytest: --full, --faults, files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

test/lint.sh  # sets posinv up first
# shellcheck disable=SC1091
. tools/activate_python.sh

# Small models gain nothing from threads, and lose much where several share a processor.
export OMP_NUM_THREADS=1

echo "test: pytest"
# The recipes, which take longest, come first.
exec python3 -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
