#!/usr/bin/env bash
# What the corpus is, what the SSL and the SE model are, how long it takes and on what.
set -euo pipefail
export RECIPE_COMMAND="egs/CORPUS/NAME/run.sh${*:+ ${*@Q}}"
cd "$(dirname "${BASH_SOURCE[0]}")"

# The choices: ./run.sh --help lists all options. For example, with models of one's own:
#   --ssl_model facebook/hubert-base-ls960   (--pr_config, --asr_config: heads of its width)
#   --se_model conf/se/conv_tasnet.yaml      (--se_checkpoint: its weights, or a released DEMUCS)
#   --resample true                          audio that isn't at 16 kHz
./enh.sh \
    --title "CORPUS: SE fine-tuned through an SSL model" \
    --asr_token_type char \
    "$@"
