#!/usr/bin/env bash
# Does position matter? SSL models that differ only in how much position their features hold are
# pretrained alike and probed. Then each criterion of arXiv 2601.21084 fine-tunes the same
# enhancement model through each of them. A run of enh.sh for each SSL model, in exp/<model>. No
# data, no GPU; hours on 2 cores.
# shellcheck disable=SC2154  # opt assigns the options
[ -n "${BASH_VERSION:-}" ] || { echo "error: $0 needs bash: start it as ./run.sh" >&2; exit 1; }
set -euo pipefail
export RECIPE_COMMAND="egs/mini_position/enh1/run.sh${*:+ ${*@Q}}"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
. scripts/options.sh

# What each SSL model has for position: options of its pretraining.
declare -A position=(
    [conv0]="positional_convolution=false"
    [conv32]="num_conv_pos_embeddings=32"
    [conv128]="num_conv_pos_embeddings=128"
    [sin1]="sinusoid_scale=1.0"
    [sin4]="sinusoid_scale=4.0"
    [sin16]="sinusoid_scale=16.0"
)
opt models "conv0 conv32 conv128 sin1 sin4 sin16" "SSL models" some_of "${!position[@]}"
# More updates than conf/ssl.yaml has: attention over 10 s learns later than over 3 s.
opt ssl_opts "--max_epoch 15 --scheduler_conf total_steps=1125" "options of their pretraining"
opt criteria "ssl_mse ssl_mse_pad ssl_softdtw" "criteria to fine-tune with" yaml_in conf/criteria
opt seeds "1 2 3" "random seeds of fine-tuning" integers
opt expdir exp "models and results"
opt enh_opts "" "more options for enh.sh, such as '--train_nj 1'"
parse_options "$@"
. ./path.sh

# The hidden state that the criteria in conf/criteria compare, the first layer's. The layers above it
# hold less and less position: with sinusoid_scale 8, a shift of 0.5 s moved the frames of layers 0 to
# 4 by 61, 45, 27, 16 and 9 % of their distance.
layer=1

# enh.sh runs in the background: Bash runs a trap only after a command in the foreground has ended.
run=
trap '[ -z "$run" ] || { kill "$run"; wait "$run"; }; exit 143' HUP INT TERM

enh() {  # enh DIR [OPTION VALUE ...]
    local dir=$1 more=()
    shift
    mapfile -t more < <(xargs -r printf '%s\n' <<< "$enh_opts")
    ./enh.sh --criteria "$criteria" --seeds "$seeds" --head_data clean --asr_token_type char \
        "${more[@]}" --expdir "$expdir/$dir" "$@" &
    run=$!
    wait "$run"
    run=
}

enh common --stop_stage 5 --skip_stages 4
experiments=()
for model in $models; do
    log "SSL model $model: ${position[$model]}"
    enh "$model" --stage 4 --title "Position: SSL model $model" \
        --ssl_opts "$ssl_opts --ssl_conf model_type=sinusoidal-hubert --ssl_conf ${position[$model]}" \
        --enh_model "$expdir/common/enh/config.yaml" \
        --enh_checkpoint "$expdir/common/enh/valid.loss.best.pth"
    enhanced=("before=$expdir/$model/seed${seeds%% *}/enh")
    for criterion in $criteria; do
        for seed in $seeds; do
            enhanced+=("$criterion/$seed=$expdir/$model/seed$seed/$criterion")
        done
    done
    python3 -m posinv.bin.position_probe --ssl "$expdir/$model/ssl/model" --data dump/raw/test_seen \
        --enhanced "${enhanced[@]}" --baseline before --layer "$layer" --out "$expdir/$model/position"
    experiments+=("$expdir/$model")
done
python3 -m posinv.bin.position_results "${experiments[@]}" --command "$RECIPE_COMMAND" \
    --out "$expdir/RESULTS.md"
