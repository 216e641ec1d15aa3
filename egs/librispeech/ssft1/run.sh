#!/usr/bin/env bash
# LASER on LibriSpeech's train-clean-100, judged by SUPERB's phoneme and speech recognition.
#   ./run.sh                             HuBERT-Base
#   ./run.sh --config conf/wavlm.yaml    WavLM-Base
#   ./run.sh --config conf/noise.yaml    HuBERT-Base, the noise-robust variant beside LASER; DEMAND
#   ./run.sh --config conf/qbe.yaml      judged by query-by-example search, too; QUESST 2014
# A GPU is needed in practice: --ngpu 1. RESULTS.md says what a run takes.
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/librispeech/ssft1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# SUPERB tries 1e-1 to 1e-5 for PR and 1e-3 to 1e-5 for ASR, by decades, for 2 % and 5 % of the steps
# (S3PRL's downstream/ctc/pr.sh, asr/asr.sh); here each is a whole training, unless --sweep_updates ends
# those that lose. --cache_dir keeps the layers: each model then reads the audio once, not 200 times.
exec ./ssft.sh \
    --title "LibriSpeech: SSL models fine-tuned without labels, SUPERB's PR and ASR" \
    --ssl_model facebook/hubert-base-ls960 \
    --expdir exp/hubert \
    --ssft_config "" \
    --methods laser_hubert \
    --published conf/published_hubert.yaml \
    --recorded_noise only \
    --test_snrs "20 10 5" \
    --asr_token_type char \
    --pr_lrs "1e-2 1e-3 5e-4 1e-4" \
    --asr_lrs "1e-4" \
    --train_nj 1 \
    "$@"
