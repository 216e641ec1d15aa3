#!/usr/bin/env bash
# The main job on CMU AN4: 50 minutes of spelled words and dates, read by 74 speakers (db.sh says
# where it is, or it is downloaded); a small SSL model and a small enhancement model, both pretrained here.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/an4/enh1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./enh.sh \
    --title "AN4: enhancement fine-tuned through a small SSL model" \
    --token_sets "train dev test" \
    --asr_token_type char \
    "$@"
