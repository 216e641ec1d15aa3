# PR and ASR as in SUPERB: on a frozen front end, a small CTC head reads the learned weighted sum of the
# SSL model's layers; greedy decoding; PER and WER.
# shellcheck shell=bash
# shellcheck disable=SC2154  # recipe.sh sets the options

# superb DIR SSL_MODEL SEED [ENHANCEMENT]: train a PR and an ASR head at each learning rate, on SSL_MODEL
# or on it behind the enhancement model in the folder ENHANCEMENT; then decode and score the test sets
# with the best of each. Heads go to DIR/<task>/lr_<rate>; DIR/<task>/best is a link to the best.
superb() {
    local dir=$1 model=$2 seed=$3 enhancement=${4:-} train=$raw/$train_set valid=$raw/$valid_set
    local frontend=(--frontend ssl) ssl_files heads=() rates lr options
    local task text unit config token_type token_list  # of head_of
    ssl_files_of "$model"
    if [ -n "$enhancement" ]; then
        frontend=(--frontend enh_ssl --frontend_conf "enh_config=$enhancement/config.yaml"
            --frontend_conf "enh_model=$enhancement/valid.loss.best.pth")
        ssl_files+=("$enhancement/config.yaml" "$enhancement/valid.loss.best.pth")
    fi
    for task in pr asr; do
        head_of "$task"
        for lr in $rates; do
            options=()
            if [ "$token_type" = bpe ]; then
                options+=(--bpemodel "$tokens/bpe.model")
            fi
            if [ "$lr" != config ]; then
                # YAML reads 1e-3 as a string.
                options+=(--optim_conf "lr=$(printf '%.10f' "$lr")")
            fi
            train "$dir/$task/lr_$lr" "${ssl_files[@]}" "$config" "$token_list" \
                "$train/$text" "$train/utt2digest" "$valid/$text" "$valid/utt2digest" \
                -- "$python" -m posinv.bin.asr_train --config "$config" \
                "${frontend[@]}" --frontend_conf "ssl=$model" \
                --token_type "$token_type" --token_list "$token_list" "${options[@]}" \
                --train_data_path_and_name_and_type "$train/wav.scp,speech,sound" \
                --train_data_path_and_name_and_type "$train/$text,text,text" \
                --valid_data_path_and_name_and_type "$valid/wav.scp,speech,sound" \
                --valid_data_path_and_name_and_type "$valid/$text,text,text" \
                --train_shape_file "$train/utt2num_samples" \
                --valid_shape_file "$valid/utt2num_samples" \
                --seed "$seed"
            heads+=("$dir/$task/lr_$lr")
        done
    done

    decode "$valid/wav.scp" "$dir/decode_valid" "${heads[@]}"
    for task in pr asr; do
        head_of "$task"
        heads=()
        for lr in $rates; do
            heads+=("$dir/$task/lr_$lr")
        done
        run_here "$dir/$task/choose.log" "$python" -m posinv.bin.choose_head --heads "${heads[@]}" \
            --decoded decode_valid/text --ref "$valid/$text" --unit "$unit" --out "$dir/$task/best"
    done

    decode "$raw/test_all/wav.scp" "$dir/decode" "$dir/pr/best" "$dir/asr/best"
    for task in pr asr; do
        head_of "$task"
        run_here "$dir/$task/best/decode/score.log" "$python" -m posinv.bin.score_text \
            --ref "$raw/test_all/$text" --hyp "$dir/$task/best/decode/text" --unit "$unit" \
            --utt2set "$raw/test_all/utt2set" --out "$dir/$task/best/decode/scores.json"
        record_inputs "$dir/$task/best/decode/scores.json" "$raw/test_all/$text" \
            "$raw/test_all/utt2set" "$dir/$task/best/decode/text"
    done
}

# head_of TASK: set what a head of pr or asr is trained and scored with.
head_of() {
    case $1 in
        pr)
            text=phn unit=phone config=$pr_config rates=${pr_lrs:-config}
            token_type=word token_list=$tokens/phn.txt
            ;;
        asr)
            text=text unit=word config=$asr_config rates=${asr_lrs:-config}
            token_type=$asr_token_type token_list=$tokens/$asr_token_type.txt
            ;;
    esac
}

# decode WAV_SCP DIR HEAD ...: make HEAD/<name of DIR>/text, all heads in one go; DIR is for the parts.
decode() {
    local scp=$1 dir=$2 head texts=()
    shift 2
    for head in "$@"; do
        texts+=("$dir/part{job}/text${#texts[@]}")
    done
    run_parts "$dir" "$scp" "$(dirname "$scp")/utt2digest" "${@/%//valid.cer_ctc.best.pth}" \
        -- "$python" -m posinv.bin.ctc_inference --heads "$@" --out "${texts[@]}" \
        --wav_scp "$dir/part{job}/list" --ngpu "$inference_gpu"
    for head in "$@"; do
        mkdir -p "$head/$(basename "$dir")"
        merge_parts "${texts[0]}" "$head/$(basename "$dir")/text"
        texts=("${texts[@]:1}")
    done
}
