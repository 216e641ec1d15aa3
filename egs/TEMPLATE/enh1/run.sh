#!/usr/bin/env bash
# What the corpus is, what the SSL and the enhancement model are, how long it takes and on what.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/CORPUS/NAME/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# The choices: ./run.sh --help lists all options. For example, with models of one's own:
#   --ssl_model facebook/hubert-base-ls960   (--pr_config, --asr_config: heads of its width)
#   --enh_model conf/enh/conv_tasnet.yaml      (--enh_checkpoint: its weights, or a released DEMUCS)
#   --resample true                          audio that isn't at 16 kHz
exec ./enh.sh \
    --title "CORPUS: enhancement fine-tuned through an SSL model" \
    --asr_token_type char \
    "$@"
