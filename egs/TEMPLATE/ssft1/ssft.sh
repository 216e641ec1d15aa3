#!/usr/bin/env bash
# Fine-tune an SSL model without labels, by aligning utterances with their perturbed copies (LASER,
# arXiv 2406.09153), and judge it by phoneme recognition and speech recognition before and after.
# A recipe's run.sh calls this with its choices; ./run.sh --help lists the options.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. ./lib.sh
. ./stages.sh

opt ssft_config conf/ssft.yaml "fine-tuning, apart from the method; empty: a method's file is all of it"
opt methods "soft_dtw mse laser" "methods to fine-tune with, each in conf/methods/<name>.yaml"
opt test_conditions clean "of clean, seen, unseen, shift, rate: the test sets"
parse_options "$@"
. ./path.sh
# shellcheck disable=SC2086  # a list
set_up $test_conditions

for method in $methods; do
    require "conf/methods/$method.yaml" "the configuration of --methods $method"
done
systems="base $methods"

model_of() {  # model_of SYSTEM SEED: its SSL model
    case $1 in
        base) echo "$ssl" ;;
        *) echo "$expdir/seed$2/$1/model" ;;
    esac
}

# Noisy test sets, and data/noise: the recordings that noise-robust methods take their noise from.
make_noise() {
    local method
    make_noisy_test_sets
    if [ "$recorded_noise" = only ]; then
        # shellcheck disable=SC1091
        . ./db.sh
        for method in $methods; do
            if grep -q '^ *noise_scp: data/noise/' "conf/methods/$method.yaml"; then
                require "${NOISE_SEEN:-NOISE_SEEN}/wav.scp" "the recordings, listed, that $method takes its noise from; NOISE_SEEN in db.sh names their folder"
                mkdir -p data/noise
                cp "$NOISE_SEEN/wav.scp" data/noise/wav.scp
            fi
        done
        return
    fi
    run_job data data/log/noise.log "$python" -m posinv.bin.make_noise --out data/noise \
        --noise_types "$seen_noises" --babble_src "data/$train_set" --seed "$noise_seed" \
        --nj "$nj" "${resampling[@]}"
}

finetune() {  # finetune METHOD SEED
    local method=$1 seed=$2 dir=$expdir/seed$2/$1 ssl_files train=$raw/$train_set valid=$raw/$valid_set
    local files=("conf/methods/$1.yaml") config=(--config "conf/methods/$1.yaml")
    if [ -n "$ssft_config" ]; then
        files=("$ssft_config" "${files[@]}")
        config=(--config "$ssft_config" --method_file "conf/methods/$method.yaml")
    fi
    files_of "$ssl"
    train "$dir" "${files[@]}" "$train/utt2num_samples" "${ssl_files[@]}" \
        -- "$python" -m posinv.bin.ssft_train "${config[@]}" --ssl "$ssl" --seed "$seed" \
        --train_data_path_and_name_and_type "$train/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$valid/wav.scp,speech,sound" \
        --train_shape_file "$train/utt2num_samples" --valid_shape_file "$valid/utt2num_samples"
    export_ssl "$dir"
}

finetune_all() {
    for_all "$methods" finetune
}

measure_and_recognise() {  # measure_and_recognise SYSTEM SEED
    local dir=$expdir/seed$2/$1 model
    model=$(model_of "$1" "$2")
    run_job decode "$dir/collapse.log" "$python" -m posinv.bin.measure_collapse --ssl "$model" \
        --wav_scp "$raw/$valid_set/wav.scp" --ngpu "$((ngpu > 0))" --out "$dir/collapse.json"
    recognise "$dir" "$model" "$2"
}

recognise_all() {
    for_all "$systems" measure_and_recognise
}

make_table() {
    "$python" -m posinv.bin.ssft_results --expdir "$expdir" --systems "$systems" \
        --sets "${test_sets[*]}" --seeds "$seeds" --title "$title" \
        --command "${RECIPE_COMMAND:-$0 $*}" --out "$results" --curves "$expdir/curves.png" \
        ${published:+--published "$published"}
}

run_stage 1 "data" prepare_data
run_stage 2 "noise" make_noise
run_stage 3 "format to $raw, token lists" format_sets
run_stage 4 "SSL model" prepare_ssl
run_stage 5 "fine-tune the SSL model" finetune_all
run_stage 6 "PR and ASR heads, decode, PER, WER" recognise_all
run_stage 7 "results table" make_table
