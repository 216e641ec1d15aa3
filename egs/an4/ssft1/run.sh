#!/usr/bin/env bash
# LASER on CMU AN4: 50 minutes of spelled words and dates, read by 74 speakers (db.sh says where it
# is, or it is downloaded); a small SSL model pretrained here, fine-tuned without labels.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/an4/ssft1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./ssft.sh \
    --title "AN4: a small SSL model fine-tuned without labels" \
    --token_sets "train dev test" \
    --asr_token_type char \
    --pr_lrs "2e-3 3e-3" \
    "$@"
