#!/usr/bin/env bash
# Fine-tune a speech-enhancement model through a frozen SSL model (arXiv 2601.21084), and evaluate it by
# phoneme recognition, speech recognition and signal measures. Each recipe's run.sh starts this script
# with its own options; ./run.sh --help lists all options.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
last_stage=9
. scripts/recipe.sh

opt train_snrs "5 10 15 20" "SNRs in dB of the training and validation set" numbers
opt noisy_copies 1 "noisy copies of each training utterance" positive
opt enh_config conf/enh.yaml "enhancement model (encoder, separator, decoder) and its pretraining" file
opt enh_model "" "another enhancement model in its place, such as conf/enh/tfgridnet.yaml or the config.yaml of an ESPnet training" file
opt enh_checkpoint "" "weights of the enhancement model, a released DEMUCS's or an ESPnet training's; empty: pretrain it here"
opt finetune_config conf/finetune.yaml "configuration of fine-tuning, without model and criterion" file
opt criteria "ssl_mse ssl_mse_pad ssl_softdtw ssl_xcorr" "criteria to fine-tune with, each in conf/criteria/<name>.yaml" yaml_in conf/criteria
opt head_data enhanced "speech that PR and ASR heads are trained on: what each system makes of the training set (enhanced), as SUPERB does with a front end, or clean speech, once for all systems and seeds (clean)" one_of enhanced clean
opt test_conditions "clean seen unseen shift rate" "conditions of the test sets" some_of clean seen unseen shift rate noisy
start_recipe "$@"

systems="noisy enh $criteria"
enh_sets=()  # whose signal measures are in the table
for condition in "${conditions[@]}"; do
    case $condition in seen | unseen | noisy) enh_sets+=("${test_set}_$condition") ;; esac
done
[ "${#enh_sets[@]}" -gt 0 ] || enh_sets=("${test_sets[@]}")
first_seed=${seeds%% *}
enh=$expdir/enh
train=$raw/${train_set}_noisy
valid=$raw/${valid_set}_noisy
enh_train=("$python" -m posinv.bin.enh_train
    --train_data_path_and_name_and_type "$train/wav.scp,speech_mix,sound"
    --train_data_path_and_name_and_type "$train/spk1.scp,speech_ref1,sound"
    --valid_data_path_and_name_and_type "$valid/wav.scp,speech_mix,sound"
    --valid_data_path_and_name_and_type "$valid/spk1.scp,speech_ref1,sound"
    --train_shape_file "$train/utt2num_samples" --valid_shape_file "$valid/utt2num_samples")

# enhancement_of SYSTEM SEED: the training directory of a system's enhancement model, if it has one.
enhancement_of() {
    case $1 in
        noisy) ;;
        enh) echo "$enh" ;;
        *) echo "$expdir/seed$2/$1" ;;
    esac
}

prepare_enhancement() {
    if [ -n "$enh_checkpoint" ]; then
        run_here "$enh/import.log" "$python" -m posinv.bin.enh_import \
            --config "${enh_model:-$enh_config}" --checkpoint "$enh_checkpoint" --output_dir "$enh"
        record_inputs "$enh/valid.loss.best.pth" "${enh_model:-$enh_config}" "$enh_checkpoint"
    else
        train "$enh" "$enh_config" ${enh_model:+"$enh_model"} \
            "$train/utt2digest" "$valid/utt2digest" \
            -- "${enh_train[@]}" --config "$enh_config" --seed 1 ${enh_model:+--model_config "$enh_model"}
    fi
}

# same_for_all_seeds SYSTEM SEED RESULT: whether the first seed's RESULT of SYSTEM is this seed's too, and
# then link it.
same_for_all_seeds() {
    [ "$2" != "$first_seed" ] && [[ $1 == noisy || $1 == enh ]] || return 1
    ln -sfn "../../seed$first_seed/$1/$3" "$expdir/seed$2/$1/$3"
}

finetune() {  # finetune CRITERION SEED
    local criterion=conf/criteria/$1.yaml ssl_files
    ssl_files_of "$ssl"
    train "$expdir/seed$2/$1" "$finetune_config" "$criterion" "$train/utt2digest" \
        "$valid/utt2digest" "$enh/config.yaml" "$enh/valid.loss.best.pth" "${ssl_files[@]}" \
        -- "${enh_train[@]}" --config "$finetune_config" --seed "$2" \
        --criterion_file "$criterion" --ssl "$ssl" \
        --model_config "$enh/config.yaml" --init_param "$enh/valid.loss.best.pth"
}

enhance() {  # enhance SYSTEM SEED: the test sets, with their scores
    local out=$expdir/seed$2/$1/enhanced model scp=$raw/test_all/wav.scp
    model=$(enhancement_of "$1" "$2")
    if [ -n "$model" ]; then
        run_parts "$out" "$scp" "$raw/test_all/utt2digest" "$model/config.yaml" \
            "$model/valid.loss.best.pth" \
            -- "$python" -m posinv.bin.enh_inference --ngpu "$inference_gpu" \
            --fs "$sampling_rate" --output_dir "$out/part{job}" \
            --data_path_and_name_and_type "$out/part{job}/list,speech_mix,sound" \
            --train_config "$model/config.yaml" --model_file "$model/valid.loss.best.pth"
        scp=$out/spk1.scp
        merge_parts "$out/part{job}/spk1.scp" "$scp"
    fi
    run_job data "$out/score.log" "$python" -m posinv.bin.score_enh --ref_scp "$raw/test_all/spk1.scp" \
        --inf_scp "$scp" --utt2set "$raw/test_all/utt2set" --sets "${enh_sets[*]}" --nj 1 \
        --out "$out/scores.json"
    record_inputs "$out/scores.json" "$raw/test_all/utt2digest" "$raw/test_all/utt2set" "$scp"
}

if begin_stage 1 "data"; then
    prepare_data
    end_stage
fi
if begin_stage 2 "noisy sets"; then
    if [ "$mix_noise" = true ]; then
        noisy "$train_set" noisy seen "$train_snrs" --copies "$noisy_copies"
        noisy "$valid_set" noisy seen "$train_snrs"
        make_noisy_test_sets
    fi
    end_stage
fi
if begin_stage 3 "format to $raw, token lists"; then
    for set in "$train_set" "$valid_set"; do
        if [ "$mix_noise" = true ]; then
            format "${set}_noisy" "${set}_noisy"
        else
            format "$set" "${set}_noisy"
        fi
    done
    format_sets
    end_stage
fi
share_data "$dumpdir"
# At the same time, where --train_nj allows it: they do not depend on each other.
if begin_stage 4 "SSL model" train; then
    queue prepare_ssl
fi
if begin_stage 5 "enhancement model" train; then
    queue prepare_enhancement
fi
end_stage
if begin_stage 6 "fine-tune the enhancement model" train; then
    for seed in $seeds; do
        for criterion in $criteria; do
            queue finetune "$criterion" "$seed"
        done
    done
    end_stage
fi
if begin_stage 7 "enhance the test sets, SI-SDR, STOI, PESQ" eval; then
    for seed in $seeds; do
        for system in $systems; do
            mkdir -p "$expdir/seed$seed/$system"
            same_for_all_seeds "$system" "$seed" enhanced || queue enhance "$system" "$seed"
        done
    done
    end_stage
fi
if begin_stage 8 "PR and ASR heads, decode, PER, WER; --qbe" eval; then
    clean_heads=$expdir/seed$first_seed/noisy/superb
    if [ "$head_data" = clean ]; then
        superb "$clean_heads" "$ssl" "$first_seed"
    fi
    for seed in $seeds; do
        for system in $systems; do
            heads_of=$expdir/seed$seed/$system/superb
            if [ "$head_data" = enhanced ]; then
                queue superb "$heads_of" "$ssl" "$seed" "$(enhancement_of "$system" "$seed")"
            elif [ "$heads_of" != "$clean_heads" ]; then
                same_for_all_seeds "$system" "$seed" superb \
                    || queue judge "$heads_of" "$clean_heads" "$expdir/seed$seed/$system/enhanced/spk1.scp"
            fi
            queue_qbe "$system" "$seed" "$ssl" "$(enhancement_of "$system" "$seed")"
        done
    done
    end_stage
fi
if begin_stage 9 "table of results, report"; then
    check_records "$enh"
    check_systems
    searched=$(qbe_sets)
    # shellcheck disable=SC2086  # a list
    attend "$python" -m posinv.bin.enh_results --expdir "$expdir" --systems $systems \
        --sets "${test_sets[*]}" --enh_sets "${enh_sets[*]}" --seeds "$seeds" \
        --title "$title" --command "${RECIPE_COMMAND:-$0 $*}" --dump "$raw" --out "$results" \
        ${published:+--published "$published"} ${searched:+--qbe_sets "$searched"}
    write_report
    end_stage
fi
end_recipe
