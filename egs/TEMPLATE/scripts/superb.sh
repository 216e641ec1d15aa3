# PR and ASR as in SUPERB: on a frozen front end, a small CTC head reads the learned weighted sum of the
# SSL model's layers; greedy decoding; PER and WER.
# shellcheck shell=bash
# shellcheck disable=SC2154  # recipe.sh sets the options

# superb DIR SSL_MODEL SEED [ENHANCEMENT]: train a PR and an ASR head at each learning rate, all at once, on
# SSL_MODEL or on it behind the enhancement model in the folder ENHANCEMENT; judge the front end with them.
# Heads go to DIR/<task>/lr_<rate>.
superb() {
    local dir=$1 model=$2 seed=$3 enhancement=${4:-} train=$raw/$train_set valid=$raw/$valid_set
    local frontend=(--frontend ssl) ssl_files inputs=() options=() lr task
    local text unit config rates token_type token_list  # of head_of
    ssl_files_of "$model"
    if [ -n "$enhancement" ]; then
        frontend=(--frontend enh_ssl --frontend_conf "enh_config=$enhancement/config.yaml"
            --frontend_conf "enh_model=$enhancement/valid.loss.best.pth")
        ssl_files+=("$enhancement/config.yaml" "$enhancement/valid.loss.best.pth")
    fi
    for task in pr asr; do
        head_of "$task"
        inputs+=("$config" "$token_list" "$train/$text" "$valid/$text")
        for lr in $rates; do
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
    judge "$dir" "$dir" "$raw/test_all/wav.scp"
}

# judge DIR TRAINED SCP: decode the validation set, and the test sets' speech in SCP, with the heads that
# superb left in TRAINED; score the test sets with the best of each task. DIR/<task>/best is a link to
# the folder with its decode.
judge() {
    local dir=$1 trained=$2 scp=$3 heads=() scored=() names lr task
    local text unit config rates token_type token_list  # of head_of
    for task in pr asr; do
        head_of "$task"
        names=()
        for lr in $rates; do
            names+=("lr_$lr")
            heads+=("$task/lr_$lr")
        done
        scored+=(--task "$task" "$unit" "$text" "${names[@]}")
    done
    decode_heads "$dir" "$trained" "$scp" "${heads[@]}"
    run_here "$dir/score.log" "$python" -m posinv.bin.score_heads --dir "$dir" \
        --valid "$raw/$valid_set" --test "$raw/test_all" "${scored[@]}"
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

# decode_heads DIR TRAINED SCP HEAD ...: decode the validation set and the test sets' speech in SCP in one
# list, with all heads TRAINED/HEAD: DIR/HEAD/decode_valid/text and DIR/HEAD/decode/text. DIR/decode is
# for the parts.
decode_heads() {
    local dir=$1 trained=$2 scp=$3 valid=$raw/$valid_set list=$1/decode/list head text texts=()
    shift 3
    while [ "${#texts[@]}" -lt $# ]; do
        texts+=("$dir/decode/part{job}/text${#texts[@]}")
    done
    # An utterance of both may have the same name.
    mkdir -p "$dir/decode"
    {
        sed 's/^/test:/' "$scp"
        sed 's/^/valid:/' "$valid/wav.scp"
    } > "$list"
    set -- "${@/#/$trained/}"
    run_parts "$dir/decode" "$list" "$raw/test_all/utt2digest" "$valid/utt2digest" \
        "${@/%//valid.cer_ctc.best.pth}" \
        -- "$python" -m posinv.bin.ctc_inference --heads "$@" --out "${texts[@]}" \
        --wav_scp "$dir/decode/part{job}/list" --ngpu "$inference_gpu"
    for text in "${texts[@]}"; do
        head=$dir/${1#"$trained/"}
        merge_parts "$text" "$dir/decode/text"
        mkdir -p "$head/decode" "$head/decode_valid"
        into "$head/decode/text" sed -n 's/^test://p' "$dir/decode/text"
        into "$head/decode_valid/text" sed -n 's/^valid://p' "$dir/decode/text"
        shift
    done
}
