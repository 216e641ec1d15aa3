#!/usr/bin/env bash
# The phrases of egs/mini, several joined to an utterance of 8 to 12 s. Options: those of
# posinv.bin.prepare_mini.
set -euo pipefail
. ./path.sh
python3 -m posinv.bin.prepare_mini --out data --phrases 4 --dev_minutes 2 --test_minutes 4 "$@"
