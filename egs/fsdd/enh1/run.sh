#!/usr/bin/env bash
# The main job on real recordings: connected digits of the Free Spoken Digit Dataset (db.sh says
# where it is), a small SSL model and a small enhancement model, both pretrained here.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/fsdd/enh1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./enh.sh \
    --title "FSDD: enhancement fine-tuned through a small SSL model, connected digits" \
    --recorded_noise true \
    --asr_token_type word \
    --seeds "1 2 3" \
    "$@"
