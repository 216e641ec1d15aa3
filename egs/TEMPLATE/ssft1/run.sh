#!/usr/bin/env bash
# What the corpus is, what the SSL model is, how long it takes and on what.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/CORPUS/NAME/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# The choices: ./run.sh --help lists all options. For example:
#   --ssl_model facebook/hubert-base-ls960   (--pr_config, --asr_config: heads of its width)
#   --methods "laser nrssft"                 conf/methods/*.yaml
#   --resample true                          audio that isn't at 16 kHz
exec ./ssft.sh \
    --title "CORPUS: an SSL model fine-tuned without labels" \
    --asr_token_type char \
    "$@"
