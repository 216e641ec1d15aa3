#!/usr/bin/env bash
# Fine-tune an SSL model without labels, by aligning utterances with their perturbed copies (LASER,
# arXiv 2406.09153), and evaluate it by phoneme recognition and speech recognition before and after.
# Each recipe's run.sh starts this script with its own options; ./run.sh --help lists all options.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
last_stage=7
. scripts/recipe.sh

opt ssft_config conf/ssft.yaml "configuration of fine-tuning, without the method; empty: the method's file is the whole configuration" file
opt methods "soft_dtw mse laser" "methods to fine-tune with, each in conf/methods/<name>.yaml" yaml_in conf/methods
opt test_conditions clean "conditions of the test sets" some_of clean seen unseen shift rate noisy
start_recipe "$@"

systems="base $methods"

# model_of SYSTEM SEED: a system's SSL model.
model_of() {
    case $1 in
        base) echo "$ssl" ;;
        *) echo "$expdir/seed$2/$1/model" ;;
    esac
}

# Make data/noise, the recordings that noise-robust methods add.
make_noise() {
    local method
    if [ "$recorded_noise" != only ]; then
        run_job data data/log/noise.log "$python" -m posinv.bin.make_noise --out data/noise \
            --noise_types "$seen_noises" --babble_src "data/$train_set" --seed "$noise_seed" \
            --on_bad_utt "$on_bad_utt" --nj "$nj" "${resampling[@]}"
        return
    fi
    # shellcheck disable=SC1091
    . ./db.sh
    for method in $methods; do
        if grep -q '^ *noise_scp: data/noise/' "conf/methods/$method.yaml"; then
            require "${NOISE_SEEN:-NOISE_SEEN}/wav.scp" "the list of recordings that $method takes its noise from; NOISE_SEEN in db.sh is their folder"
            mkdir -p data/noise
            into data/noise/wav.scp cat "$NOISE_SEEN/wav.scp"
        fi
    done
}

finetune() {  # finetune METHOD SEED
    local dir=$expdir/seed$2/$1 ssl_files train=$raw/$train_set valid=$raw/$valid_set
    local files=("conf/methods/$1.yaml") config=(--config "conf/methods/$1.yaml")
    if [ -n "$ssft_config" ]; then
        files=("$ssft_config" "${files[@]}")
        config=(--config "$ssft_config" --method_file "conf/methods/$1.yaml")
    fi
    ssl_files_of "$ssl"
    train "$dir" "${files[@]}" "$train/utt2digest" "$valid/utt2digest" "${ssl_files[@]}" \
        -- "$python" -m posinv.bin.ssft_train "${config[@]}" --ssl "$ssl" --seed "$2" \
        --train_data_path_and_name_and_type "$train/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$valid/wav.scp,speech,sound" \
        --train_shape_file "$train/utt2num_samples" --valid_shape_file "$valid/utt2num_samples"
    export_ssl "$dir" valid.loss.best.pth
}

measure_collapse() {  # measure_collapse SYSTEM SEED
    local dir=$expdir/seed$2/$1 model ssl_files
    model=$(model_of "$1" "$2")
    run_job decode "$dir/collapse.log" "$python" -m posinv.bin.measure_collapse --ssl "$model" \
        --wav_scp "$raw/$valid_set/wav.scp" --ngpu "$inference_gpu" --out "$dir/collapse.json"
    ssl_files_of "$model"
    record_inputs "$dir/collapse.json" "$raw/$valid_set/utt2digest" "${ssl_files[@]}"
}

if begin_stage 1 "data"; then
    prepare_data
    end_stage
fi
if begin_stage 2 "noise"; then
    make_noisy_test_sets
    make_noise
    end_stage
fi
if begin_stage 3 "format to $raw, token lists"; then
    format_sets
    end_stage
fi
share_data data "$dumpdir"
if begin_stage 4 "SSL model" train; then
    prepare_ssl
    end_stage
fi
if begin_stage 5 "fine-tune the SSL model" train; then
    for seed in $seeds; do
        for method in $methods; do
            queue finetune "$method" "$seed"
        done
    done
fi
# Each system is evaluated as soon as it is fine-tuned, even if others are still in stage 5.
if begin_stage 6 "PR and ASR heads, decode, PER, WER; --qbe" eval; then
    for seed in $seeds; do
        for system in $systems; do
            queue after "finetune $system $seed" measure_collapse "$system" "$seed"
            queue after "finetune $system $seed" superb "$expdir/seed$seed/$system/superb" \
                "$(model_of "$system" "$seed")" "$seed"
            queue_qbe "$system" "$seed" "$(model_of "$system" "$seed")"
        done
    done
fi
end_stage
if begin_stage 7 "table of results, report"; then
    check_systems
    searched=$(qbe_sets)
    attend "$python" -m posinv.bin.ssft_results --expdir "$expdir" --systems "$systems" \
        --sets "${test_sets[*]}" --seeds "$seeds" --title "$title" \
        --command "${RECIPE_COMMAND:-$0 $*}" --dump "$raw" --out "$results" --curves "$expdir/curves.png" \
        ${published:+--published "$published"} ${searched:+--qbe_sets "$searched"}
    write_report
    end_stage
fi
end_recipe
