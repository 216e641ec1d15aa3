#!/usr/bin/env bash
# LASER on real recordings: connected digits of the Free Spoken Digit Dataset (db.sh says where it
# is), a small SSL model pretrained here, fine-tuned without labels by three methods.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/fsdd/ssft1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./ssft.sh \
    --title "FSDD: a small SSL model fine-tuned without labels, connected digits" \
    --asr_token_type word \
    --pr_lrs "2e-3 3e-3" \
    --seeds "1 2 3" \
    "$@"
