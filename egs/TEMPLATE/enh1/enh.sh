#!/usr/bin/env bash
# Fine-tune a speech-enhancement (SE) model through a frozen SSL model (arXiv 2601.21084), and
# judge it by phoneme recognition, speech recognition and signal measures. A recipe's run.sh
# calls this with its choices; ./run.sh --help lists the options.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. ./lib.sh

opt stage 1 "first stage to run"
opt stop_stage 100 "last stage to run"
opt skip_stages "" "stages to leave out, such as '4 5'"
opt ngpu 0 "GPUs for training (0: CPU)"
opt nj 2 "processes for data preparation and scoring"
opt train_nj 2 "trainings at once (with --ngpu 1, on the one GPU)"
opt inference_nj 2 "systems enhanced at once"
opt dumpdir dump "formatted data"
opt expdir exp "models and results"
opt python python3 "Python"
opt seeds 1 "seeds of fine-tuning and heads; the table has mean and standard deviation over them"

opt train_set train "training set, in data/"
opt valid_set dev "validation set"
opt test_set test "test set; the noisy test sets are made from it"
opt local_data_opts "" "options for local/data.sh"
opt resample false "resample audio that is not at 16 kHz (true), or refuse it (false)"

opt seen_noises "white pink babble hum" "noises of the training set and of the seen test set"
opt unseen_noises "brown modulated impulsive" "noises of the unseen test set"
opt recorded_noise false "let recorded noise join: NOISE_SEEN and NOISE_UNSEEN of db.sh"
opt train_snrs "5 10 15 20" "SNRs in dB of the training and validation set"
opt test_snrs "5 10 15 20" "SNRs in dB of the test sets"
opt noisy_copies 1 "noisy copies of each training utterance"
opt noise_seed 0 "of the noise draw"

opt ssl_model "" "SSL model: hub name or folder; empty: pretrain a small one here"
opt ssl_config conf/ssl.yaml "of that pretraining"
opt ssl_units 50 "k-means units of that pretraining"
opt se_checkpoint "" "released DEMUCS checkpoint to start from; empty: pretrain the SE model"
opt se_config conf/se.yaml "SE model, and its pretraining"
opt finetune_config conf/finetune.yaml "fine-tuning, apart from the criterion"
opt criteria "ssl_mse ssl_mse_pad ssl_softdtw ssl_xcorr" "criteria to fine-tune with, each in conf/criteria/<name>.yaml"

opt asr_token_type char "tokens of ASR: char, word or bpe"
opt nbpe 100 "pieces of the sentencepiece model, for bpe"
opt pr_config conf/pr.yaml "phoneme recognition head"
opt asr_config conf/asr.yaml "speech recognition head"
opt title "Speech enhancement fine-tuned through an SSL model" "heading of the results"
opt results RESULTS.md "the table, in Markdown"

parse_options "$@"
. ./path.sh

sampling_rate=16000
conditions="clean seen unseen shift rate"
raw=$dumpdir/raw
tokens=$dumpdir/tokens
# shellcheck disable=SC2086  # a list
test_sets=$(printf "${test_set}_%s " $conditions)
for name in resample recorded_noise; do
    case ${!name} in true | false) ;; *) die "--$name ${!name}: must be true or false" ;; esac
done
case $asr_token_type in char | word | bpe) ;; *) die "--asr_token_type $asr_token_type: must be char, word or bpe" ;; esac
for criterion in $criteria; do
    require "conf/criteria/$criterion.yaml" "the configuration of --criteria $criterion"
done
systems="noisy se $criteria"

# The SSL and SE models, wherever they come from.
ssl=${ssl_model:-$expdir/ssl/model}
se=$expdir/se

se_model_of() {  # se_model_of SYSTEM SEED: its training directory
    case $1 in
        noisy) ;;
        se) echo "$se" ;;
        *) echo "$expdir/seed$2/$1" ;;
    esac
}

prepare_data() {
    # shellcheck disable=SC2086  # options, split
    local/data.sh $local_data_opts
}

noisy() {  # noisy SOURCE TAG NOISES SNRS [ARG ...]: data/<SOURCE>_<TAG>
    local source=$1 tag=$2 noises=$3 snrs=$4
    shift 4
    run_logged "data/log/$source.$tag.log" "$python" -m posinv.bin.mix_noise \
        --src "data/$source" --out "data/${source}_$tag" --tag "$tag" --seed "$noise_seed" \
        --noise_types "$noises" --snrs "$snrs" --babble_src "data/$train_set" --nj "$nj" "$@"
}

make_noisy_sets() {
    # shellcheck disable=SC1091
    . ./db.sh
    local seen=() unseen=() seen_noises=$seen_noises unseen_noises=$unseen_noises
    if [ "$recorded_noise" = true ] && [ -n "${NOISE_SEEN:-}" ]; then
        require "$NOISE_SEEN" "NOISE_SEEN in db.sh"
        seen=(--recorded "$NOISE_SEEN")
        seen_noises+=" recorded"
    fi
    if [ "$recorded_noise" = true ] && [ -n "${NOISE_UNSEEN:-}" ]; then
        require "$NOISE_UNSEEN" "NOISE_UNSEEN in db.sh"
        unseen=(--recorded "$NOISE_UNSEEN")
        unseen_noises+=" recorded"
    fi
    noisy "$train_set" noisy "$seen_noises" "$train_snrs" "${seen[@]}" --copies "$noisy_copies"
    noisy "$valid_set" noisy "$seen_noises" "$train_snrs" "${seen[@]}"
    noisy "$test_set" seen "$seen_noises" "$test_snrs" "${seen[@]}"
    noisy "$test_set" unseen "$unseen_noises" "$test_snrs" "${unseen[@]}"
    noisy "$test_set" shift "$seen_noises" "$test_snrs" "${seen[@]}" --silence 0.2 1.0
    noisy "$test_set" rate "$seen_noises" "$test_snrs" "${seen[@]}" --speeds "0.85 1.15"
}

format() {  # format SOURCE NAME
    local opts=()
    if [ "$resample" = true ]; then
        opts=(--resample)
    fi
    run_logged "$raw/log/$2.log" "$python" -m posinv.bin.format_data --src "data/$1" \
        --out "$raw/$2" --sampling_rate "$sampling_rate" --nj "$nj" "${opts[@]}"
}

format_sets() {
    local set file
    for set in "$train_set" "$valid_set" "${train_set}_noisy" "${valid_set}_noisy"; do
        format "$set" "$set"
    done
    format "$test_set" "${test_set}_clean"
    for set in seen unseen shift rate; do
        format "${test_set}_$set" "${test_set}_$set"
    done
    # One list of all test sets, so that each system is enhanced and decoded by one command.
    rm -rf "$raw/test_all"
    mkdir -p "$raw/test_all.partial"
    for file in wav.scp spk1.scp text phn utt2num_samples; do
        for set in $test_sets; do
            cat "$raw/$set/$file"
        done | LC_ALL=C sort > "$raw/test_all.partial/$file"
    done
    for set in $test_sets; do
        sed "s/ .*/ $set/" "$raw/$set/wav.scp"
    done | LC_ALL=C sort > "$raw/test_all.partial/utt2set"
    mv "$raw/test_all.partial" "$raw/test_all"

    mkdir -p "$tokens"
    token_list phn word "$tokens/phn.txt"
    if [ "$asr_token_type" = bpe ]; then
        run_logged "$tokens/log/sentencepiece.log" "$python" -m posinv.bin.train_sentencepiece \
            --text "$raw/$train_set/text" --size "$nbpe" --out "$tokens/bpe.model"
        token_list text bpe "$tokens/bpe.txt" --bpemodel "$tokens/bpe.model"
    else
        token_list text "$asr_token_type" "$tokens/$asr_token_type.txt"
    fi
    local check=(--phn_tokens "$tokens/phn.txt")
    if [ "$asr_token_type" != bpe ]; then
        check+=("--${asr_token_type}_tokens" "$tokens/$asr_token_type.txt")
    fi
    for set in "$train_set" "$valid_set" $test_sets; do
        run_logged "$raw/log/validate_$set.log" "$python" -m posinv.bin.validate_data "$raw/$set" \
            --sampling_rate "$sampling_rate" --nj "$nj" "${check[@]}"
    done
}

token_list() {  # token_list FILE TYPE OUT [ARG ...]
    local file=$1 type=$2 out=$3
    shift 3
    run_logged "$tokens/log/$(basename "$out").log" "$python" -m espnet2.bin.tokenize_text \
        --input "$raw/$train_set/$file" --output "$out" --field 2- --token_type "$type" \
        --write_vocabulary true --add_symbol "<blank>:0" --add_symbol "<unk>:1" \
        --add_symbol "<sos/eos>:-1" "$@"
}

prepare_ssl() {
    if [ -n "$ssl_model" ]; then
        log "using the SSL model $ssl_model"
        return
    fi
    local set opts
    for set in "$train_set" "$valid_set"; do
        opts=(--num_units "$ssl_units")
        if [ "$set" = "$valid_set" ]; then
            opts=(--kmeans "$expdir/ssl/units_$train_set/kmeans.npz")
        fi
        run_logged "$expdir/ssl/log/units_$set.log" "$python" -m posinv.bin.pretrain_units \
            --wav_scp "$raw/$set/wav.scp" --out "$expdir/ssl/units_$set" --nj "$nj" "${opts[@]}"
    done
    train "$expdir/ssl" "$ssl_config" "$raw/$train_set/utt2num_samples" \
        "$expdir/ssl/units_$train_set/units" \
        -- "$python" -m posinv.bin.pretrain_train --config "$ssl_config" \
        --num_units "$ssl_units" \
        --train_data_path_and_name_and_type "$raw/$train_set/wav.scp,speech,sound" \
        --train_data_path_and_name_and_type "$expdir/ssl/units_$train_set/units,units,text_int" \
        --valid_data_path_and_name_and_type "$raw/$valid_set/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$expdir/ssl/units_$valid_set/units,units,text_int" \
        --train_shape_file "$raw/$train_set/utt2num_samples" \
        --valid_shape_file "$raw/$valid_set/utt2num_samples"
    if [ -e "$ssl/config.json" ]; then
        log "$ssl: exported already: kept"
    else
        run_logged "$expdir/ssl/export.log" "$python" -m posinv.bin.pretrain_export \
            --exp "$expdir/ssl" --out "$ssl"
    fi
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
    if [ -n "$se_checkpoint" ]; then
        run_logged "$se/import.log" "$python" -m posinv.bin.enh_import --config "$se_config" \
            --checkpoint "$se_checkpoint" --output_dir "$se"
    else
        train_se "$se" 1 "$se_config" --
    fi
}

finetune() {
    local seed criterion inputs=("$se/valid.loss.best.pth")
    if [ -d "$ssl" ]; then
        inputs+=("$ssl/config.json" "$ssl/model.safetensors")
    fi
    set_max_jobs "$train_nj"
    for seed in $seeds; do
        for criterion in $criteria; do
            queue train_se "$expdir/seed$seed/$criterion" "$seed" "$finetune_config" \
                "conf/criteria/$criterion.yaml" "${inputs[@]}" \
                -- --criterion_file "conf/criteria/$criterion.yaml" --ssl "$ssl" \
                --init_param "$se/valid.loss.best.pth"
        done
    done
    wait_jobs
}

enhance() {  # enhance SYSTEM SEED
    local system=$1 seed=$2 out=$expdir/seed$2/$1/enhanced model scp=$raw/test_all/wav.scp
    model=$(se_model_of "$system" "$seed")
    if [ -n "$model" ]; then
        run_logged "$out/inference.log" "$python" -m posinv.bin.enh_inference \
            --ngpu "$ngpu" --fs "$sampling_rate" --output_dir "$out" \
            --data_path_and_name_and_type "$scp,speech_mix,sound" \
            --train_config "$model/config.yaml" --model_file "$model/valid.loss.best.pth"
        scp=$out/spk1.scp
    fi
    run_logged "$out/score.log" "$python" -m posinv.bin.score_enh --ref_scp "$raw/test_all/spk1.scp" \
        --inf_scp "$scp" --utt2set "$raw/test_all/utt2set" --nj 1 --out "$out/scores.json"
}

enhance_all() {
    local seed system first=${seeds%% *}
    set_max_jobs "$inference_nj"
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

recognise() {
    local seed system model opts
    set_max_jobs "$train_nj"
    for seed in $seeds; do
        for system in $systems; do
            opts=()
            model=$(se_model_of "$system" "$seed")
            if [ -n "$model" ]; then
                opts=(--enh_dir "$model")
            fi
            queue run_logged "$expdir/seed$seed/$system/superb/superb.log" ./superb.sh \
                --dir "$expdir/seed$seed/$system/superb" --ssl "$ssl" --seed "$seed" \
                --train_set "$raw/$train_set" --valid_set "$raw/$valid_set" \
                --test_set "$raw/test_all" --tokens_dir "$tokens" --pr_config "$pr_config" \
                --asr_config "$asr_config" --asr_token_type "$asr_token_type" --ngpu "$ngpu" \
                --python "$python" "${opts[@]}"
        done
    done
    wait_jobs
}

make_table() {
    local rows=("noisy=noisy input" "se=SE before fine-tuning")
    # shellcheck disable=SC2206  # a list
    rows+=($criteria)
    "$python" -m posinv.bin.results --expdir "$expdir" --systems "${rows[@]}" \
        --sets "$test_sets" --se_sets "${test_set}_seen ${test_set}_unseen" --seeds "$seeds" \
        --title "$title" \
        --command "${RECIPE_COMMAND:-$0 $*}" --out "$results"
}

run_stage 1 "data" prepare_data
run_stage 2 "noisy sets" make_noisy_sets
run_stage 3 "format to $raw, token lists" format_sets
set_max_jobs "$train_nj"
queue run_stage 4 "SSL model" prepare_ssl
queue run_stage 5 "SE model" prepare_se
wait_jobs
run_stage 6 "fine-tune the SE model" finetune
run_stage 7 "enhance the test sets, SI-SDR, STOI, PESQ" enhance_all
run_stage 8 "PR and ASR heads, decode, PER, WER" recognise
run_stage 9 "results table" make_table
