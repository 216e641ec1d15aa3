# PR and ASR as in SUPERB: on a frozen front end, a small CTC head reads the learned weighted sum of the
# SSL model's layers; greedy decoding; PER and WER.
# shellcheck shell=bash
# shellcheck disable=SC2154  # recipe.sh sets the options

# superb DIR SSL_MODEL SEED [ENHANCEMENT]: train a PR and an ASR head at each learning rate, all at once, on
# SSL_MODEL or on it behind the enhancement model in the folder ENHANCEMENT; decode the validation and
# test sets; score the test sets with the best of each. Heads go to DIR/<task>/lr_<rate>;
# DIR/<task>/best is a link to the best.
superb() {
    local dir=$1 model=$2 seed=$3 enhancement=${4:-} train=$raw/$train_set valid=$raw/$valid_set
    local frontend=(--frontend ssl) ssl_files inputs=() options=() heads=() scored=() rates lr task names
    local text unit config token_type token_list  # of head_of
    ssl_files_of "$model"
    if [ -n "$enhancement" ]; then
        frontend=(--frontend enh_ssl --frontend_conf "enh_config=$enhancement/config.yaml"
            --frontend_conf "enh_model=$enhancement/valid.loss.best.pth")
        ssl_files+=("$enhancement/config.yaml" "$enhancement/valid.loss.best.pth")
    fi
    for task in pr asr; do
        head_of "$task"
        inputs+=("$config" "$token_list" "$train/$text" "$valid/$text")
        names=()
        for lr in $rates; do
            names+=("lr_$lr")
            heads+=("$dir/$task/lr_$lr")
            options+=(--head "$dir/$task/lr_$lr" --config "$config"
                --token_type "$token_type" --token_list "$token_list"
                --train_data_path_and_name_and_type "$train/$text,text,text"
                --valid_data_path_and_name_and_type "$valid/$text,text,text")
            if [ "$token_type" = bpe ]; then
                options+=(--bpemodel "$tokens/bpe.model")
            fi
            if [ "$lr" != config ]; then
                # YAML reads 1e-3 as a string.
                options+=(--optim_conf "lr=$(printf '%.10f' "$lr")")
            fi
        done
        scored+=(--task "$task" "$unit" "$text" "${names[@]}")
    done
    options+=(--all "${frontend[@]}" --frontend_conf "ssl=$model")
    if [ "$sweep_updates" != 0 ]; then
        options+=(--sweep_updates "$sweep_updates")
    fi
    if [ -n "$cache_dir" ]; then
        options+=(--cache_dir "$cache_dir")
    fi
    train "$dir" "${ssl_files[@]}" "${inputs[@]}" "$train/utt2digest" "$valid/utt2digest" \
        -- "$python" -m posinv.bin.heads_train "${options[@]}" \
        --train_data_path_and_name_and_type "$train/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$valid/wav.scp,speech,sound" \
        --train_shape_file "$train/utt2num_samples" \
        --valid_shape_file "$valid/utt2num_samples" \
        --seed "$seed"

    decode_heads "$dir" "$valid" "${heads[@]}"
    run_here "$dir/score.log" "$python" -m posinv.bin.score_heads --dir "$dir" --valid "$valid" \
        --test "$raw/test_all" "${scored[@]}"
    for task in pr asr; do
        head_of "$task"
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

# decode_heads DIR VALID HEAD ...: decode the validation set in VALID and the test sets in one list, with
# all heads: HEAD/decode_valid/text and HEAD/decode/text. DIR/decode is for the parts.
decode_heads() {
    local dir=$1 valid=$2 list=$1/decode/list text texts=()
    shift 2
    while [ "${#texts[@]}" -lt $# ]; do
        texts+=("$dir/decode/part{job}/text${#texts[@]}")
    done
    # An utterance of both may have the same name.
    mkdir -p "$dir/decode"
    {
        sed 's/^/test:/' "$raw/test_all/wav.scp"
        sed 's/^/valid:/' "$valid/wav.scp"
    } > "$list"
    run_parts "$dir/decode" "$list" "$raw/test_all/utt2digest" "$valid/utt2digest" \
        "${@/%//valid.cer_ctc.best.pth}" \
        -- "$python" -m posinv.bin.ctc_inference --heads "$@" --out "${texts[@]}" \
        --wav_scp "$dir/decode/part{job}/list" --ngpu "$inference_gpu"
    for text in "${texts[@]}"; do
        merge_parts "$text" "$dir/decode/text"
        mkdir -p "$1/decode" "$1/decode_valid"
        into "$1/decode/text" sed -n 's/^test://p' "$dir/decode/text"
        into "$1/decode_valid/text" sed -n 's/^valid://p' "$dir/decode/text"
        shift
    done
}
