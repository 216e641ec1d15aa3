#!/usr/bin/env bash
# The main job on an embedded corpus: 20 minutes of speech by eSpeak NG, a small SSL model and a
# small enhancement model, both pretrained here. It needs no data and no GPU, and takes 10 to 20 minutes
# on 2 cores.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/mini/enh1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./enh.sh \
    --title "mini: enhancement fine-tuned through a small SSL model, synthetic speech" \
    --asr_token_type char \
    "$@"
