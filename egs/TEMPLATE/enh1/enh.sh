#!/usr/bin/env bash
# Fine-tune a speech-enhancement (SE) model through a frozen SSL model (arXiv 2601.21084), and
# judge it by phoneme recognition, speech recognition and signal measures. A recipe's run.sh
# calls this with its choices; ./run.sh --help lists the options.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. ./lib.sh
. ./stages.sh

opt train_snrs "5 10 15 20" "SNRs in dB of the training and validation set"
opt noisy_copies 1 "noisy copies of each training utterance"
opt se_config conf/se.yaml "SE model (encoder, separator, decoder), and its pretraining"
opt se_model "" "another SE model in its place, such as conf/se/tfgridnet.yaml or an ESPnet training's config.yaml"
opt se_checkpoint "" "the SE model's weights, a released DEMUCS's or an ESPnet training's; empty: pretrain it here"
opt finetune_config conf/finetune.yaml "fine-tuning, apart from model and criterion"
opt criteria "ssl_mse ssl_mse_pad ssl_softdtw ssl_xcorr" "criteria to fine-tune with, each in conf/criteria/<name>.yaml"
opt test_conditions "clean seen unseen shift rate" "of these: the test sets"
parse_options "$@"
. ./path.sh
# shellcheck disable=SC2086  # a list
set_up $test_conditions

for criterion in $criteria; do
    require "conf/criteria/$criterion.yaml" "the configuration of --criteria $criterion"
done
systems="noisy se $criteria"
se=$expdir/se

se_model_of() {  # se_model_of SYSTEM SEED: its training directory
    case $1 in
        noisy) ;;
        se) echo "$se" ;;
        *) echo "$expdir/seed$2/$1" ;;
    esac
}

make_noisy_sets() {
    noisy "$train_set" noisy seen "$train_snrs" --copies "$noisy_copies"
    noisy "$valid_set" noisy seen "$train_snrs"
    make_noisy_test_sets
}

format_all() {
    format_sets "${train_set}_noisy" "${valid_set}_noisy"
}

train_se() {  # train_se DIR SEED CONFIG [INPUT ...] -- [ARG ...]
    local dir=$1 seed=$2 config=$3 inputs=() train=$raw/${train_set}_noisy valid=$raw/${valid_set}_noisy
    shift 3
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    train "$dir" "$config" "$train/utt2num_samples" "${inputs[@]}" \
        -- "$python" -m posinv.bin.enh_train --config "$config" --seed "$seed" \
        --train_data_path_and_name_and_type "$train/wav.scp,speech_mix,sound" \
        --train_data_path_and_name_and_type "$train/spk1.scp,speech_ref1,sound" \
        --valid_data_path_and_name_and_type "$valid/wav.scp,speech_mix,sound" \
        --valid_data_path_and_name_and_type "$valid/spk1.scp,speech_ref1,sound" \
        --train_shape_file "$train/utt2num_samples" --valid_shape_file "$valid/utt2num_samples" "$@"
}

prepare_se() {
    local model=()
    if [ -n "$se_checkpoint" ]; then
        run_logged "$se/import.log" "$python" -m posinv.bin.enh_import \
            --config "${se_model:-$se_config}" --checkpoint "$se_checkpoint" --output_dir "$se"
    else
        if [ -n "$se_model" ]; then
            model=(--model_config "$se_model")
        fi
        train_se "$se" 1 "$se_config" ${se_model:+"$se_model"} -- "${model[@]}"
    fi
}

finetune() {  # finetune CRITERION SEED
    local criterion=$1 seed=$2 ssl_files
    files_of "$ssl"
    train_se "$expdir/seed$seed/$criterion" "$seed" "$finetune_config" \
        "conf/criteria/$criterion.yaml" "$se/config.yaml" "$se/valid.loss.best.pth" \
        "${ssl_files[@]}" -- --criterion_file "conf/criteria/$criterion.yaml" --ssl "$ssl" \
        --model_config "$se/config.yaml" --init_param "$se/valid.loss.best.pth"
}

finetune_all() {
    for_all "$criteria" finetune
}

enhance() {  # enhance SYSTEM SEED
    local system=$1 seed=$2 out=$expdir/seed$2/$1/enhanced model scp=$raw/test_all/wav.scp
    model=$(se_model_of "$system" "$seed")
    if [ -n "$model" ]; then
        run_parts "$out" "$scp" "$model/config.yaml" "$model/valid.loss.best.pth" \
            -- "$python" -m posinv.bin.enh_inference --ngpu "$((ngpu > 0))" \
            --fs "$sampling_rate" --output_dir "$out/part{job}" \
            --data_path_and_name_and_type "$out/part{job}/list,speech_mix,sound" \
            --train_config "$model/config.yaml" --model_file "$model/valid.loss.best.pth"
        scp=$out/spk1.scp
        merge_parts "$out/part{job}/spk1.scp" "$scp"
    fi
    run_job data "$out/score.log" "$python" -m posinv.bin.score_enh --ref_scp "$raw/test_all/spk1.scp" \
        --inf_scp "$scp" --utt2set "$raw/test_all/utt2set" --nj 1 --out "$out/scores.json"
}

enhance_all() {
    local seed system first=${seeds%% *}
    set_max_jobs "$train_nj"
    for seed in $seeds; do
        for system in $systems; do
            mkdir -p "$expdir/seed$seed/$system"
            if [ "$seed" != "$first" ] && [[ $system == noisy || $system == se ]]; then
                # The same for every seed.
                ln -sfn "../../seed$first/$system/enhanced" "$expdir/seed$seed/$system/enhanced"
            else
                queue enhance "$system" "$seed"
            fi
        done
    done
    wait_jobs
}

recognise_system() {  # recognise_system SYSTEM SEED
    local model opts=()
    model=$(se_model_of "$1" "$2")
    if [ -n "$model" ]; then
        opts=(--enh_dir "$model")
    fi
    recognise "$expdir/seed$2/$1" "$ssl" "$2" "${opts[@]}"
}

recognise_all() {
    for_all "$systems" recognise_system
}

make_table() {
    local rows=("noisy=noisy input" "se=SE before fine-tuning") condition se_sets=()
    # shellcheck disable=SC2206  # a list
    rows+=($criteria)
    for condition in "${conditions[@]}"; do
        case $condition in seen | unseen) se_sets+=("${test_set}_$condition") ;; esac
    done
    "$python" -m posinv.bin.enh_results --expdir "$expdir" --systems "${rows[@]}" \
        --sets "${test_sets[*]}" --se_sets "${se_sets[*]:-${test_sets[*]}}" --seeds "$seeds" \
        --title "$title" --command "${RECIPE_COMMAND:-$0 $*}" --out "$results" \
        ${published:+--published "$published"}
}

run_stage 1 "data" prepare_data
run_stage 2 "noisy sets" make_noisy_sets
run_stage 3 "format to $raw, token lists" format_all
set_max_jobs "$train_nj"
queue run_stage 4 "SSL model" prepare_ssl
queue run_stage 5 "SE model" prepare_se
wait_jobs
run_stage 6 "fine-tune the SE model" finetune_all
run_stage 7 "enhance the test sets, SI-SDR, STOI, PESQ" enhance_all
run_stage 8 "PR and ASR heads, decode, PER, WER" recognise_all
run_stage 9 "results table" make_table
