#!/usr/bin/env bash
# Synthesise the corpus: data/{train,dev,test}. Options: those of posinv.bin.prepare_mini.
set -euo pipefail
. ./path.sh
python3 -m posinv.bin.prepare_mini --out data "$@"
