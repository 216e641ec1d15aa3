#!/usr/bin/env bash
# LASER on an embedded corpus: 20 minutes of speech by eSpeak NG, a small SSL model pretrained here,
# fine-tuned without labels by three methods. It needs no data and no GPU, and takes 9 to 15 minutes
# on 2 cores.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/mini/ssft1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./ssft.sh \
    --title "mini: a small SSL model fine-tuned without labels, synthetic speech" \
    --asr_token_type char \
    --pr_lrs "2e-3 3e-3" \
    "$@"
