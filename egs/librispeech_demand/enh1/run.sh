#!/usr/bin/env bash
# Position-invariant fine-tuning at the paper's size: the released master64 DEMUCS through
# HuBERT-Base, on LibriSpeech's train-clean-100 with DEMAND's noises.
#   ./run.sh --config conf/qbe.yaml    judged by query-by-example search, too; QUESST 2014
# A GPU is needed in practice: --ngpu 1. RESULTS.md says what a run takes.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/librispeech_demand/enh1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

exec ./enh.sh \
    --title "LibriSpeech and DEMAND: master64 fine-tuned through HuBERT-Base" \
    --ssl_model facebook/hubert-base-ls960 \
    --enh_checkpoint data/master64.th \
    --criteria "ssl_mse ssl_mse_pad ssl_softdtw" \
    --recorded_noise only \
    --train_snrs "20 10 5" \
    --test_snrs "20 10 5" \
    --test_conditions "clean seen unseen" \
    --asr_token_type char \
    --pr_lrs "1e-2 1e-3 5e-4 1e-4" \
    --asr_lrs "1e-4" \
    --train_nj 1 \
    "$@"
