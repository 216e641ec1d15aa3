#!/usr/bin/env bash
# PR and ASR with SUPERB's recipe: a front end that stays frozen, a small CTC head on the learned
# weighted sum of its layers, greedy decoding, PER and WER. Called by enh.sh for one system.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. ./lib.sh

opt dir "" "where to work; the heads go to <dir>/{pr,asr}/lr_<rate>, the best is <dir>/{pr,asr}/best"
opt ssl "" "the SSL model: a hub name or a folder"
opt enh_dir "" "training directory of the SE model in front of it; empty: none"
opt enh_checkpoint valid.loss.best.pth "its checkpoint"
opt train_set dump/raw/train "what the heads are trained on"
opt valid_set dump/raw/dev "what chooses the best epoch"
opt test_set dump/raw/test_all "what is decoded, with utt2set"
opt tokens_dir dump/tokens "token lists: phn.txt, <asr_token_type>.txt, bpe.model"
opt asr_token_type char "tokens of ASR: char, word or bpe"
opt pr_config conf/pr.yaml "phoneme recognition head"
opt asr_config conf/asr.yaml "speech recognition head"
opt pr_lrs "" "learning rates of the phoneme head; empty: its configuration's"
opt asr_lrs "" "learning rates of the ASR head; of several, the best on the validation set is kept"
opt seed 1 "of the heads"
opt ngpu 0 "GPUs for a training (0: CPU)"
opt num_nodes "$num_nodes" "machines for a training, each with --ngpu GPUs"
opt inference_nj 1 "parts that a list is decoded in, all at once"
opt cmd_backend "$cmd_backend" "where jobs run: local (here) or slurm"
opt slurm_conf "$slurm_conf" "options of SLURM's jobs"
opt python python3 "Python"
parse_options "$@"
. ./path.sh

frontend=(--frontend ssl --frontend_conf "ssl=$ssl")
files_of "$ssl"
inputs=("${ssl_files[@]}")
if [ -n "$enh_dir" ]; then
    frontend=(--frontend enh_ssl --frontend_conf "ssl=$ssl"
        --frontend_conf "enh_config=$enh_dir/config.yaml"
        --frontend_conf "enh_model=$enh_dir/$enh_checkpoint")
    inputs+=("$enh_dir/config.yaml" "$enh_dir/$enh_checkpoint")
fi

train_head() {  # train_head NAME LR CONFIG TEXT TOKEN_TYPE TOKENS
    local name=$1 lr=$2 config=$3 text=$4 token_type=$5 tokens=$6 opts=()
    if [ "$token_type" = bpe ]; then
        opts+=(--bpemodel "$tokens_dir/bpe.model")
    fi
    if [ "$lr" != config ]; then
        # To YAML 1e-3 is no number.
        opts+=(--optim_conf "lr=$(printf '%.10f' "$lr")")
    fi
    log "superb: training $dir/$name/lr_$lr"
    train "$dir/$name/lr_$lr" "${inputs[@]}" "$config" "$tokens" \
        "$train_set/$text" "$train_set/utt2num_samples" "$valid_set/$text" \
        -- "$python" -m posinv.bin.asr_train --config "$config" "${frontend[@]}" \
        --token_type "$token_type" --token_list "$tokens" "${opts[@]}" \
        --train_data_path_and_name_and_type "$train_set/wav.scp,speech,sound" \
        --train_data_path_and_name_and_type "$train_set/$text,text,text" \
        --valid_data_path_and_name_and_type "$valid_set/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$valid_set/$text,text,text" \
        --train_shape_file "$train_set/utt2num_samples" \
        --valid_shape_file "$valid_set/utt2num_samples" \
        --seed "$seed"
}

decode() {  # decode SET NAME HEAD ...: HEAD/NAME/text
    local set=$1 name=$2 head out=()
    shift 2
    for head in "$@"; do
        out+=("$dir/$name/part{job}/text${#out[@]}")
    done
    log "superb: $dir: decoding $set"
    run_parts "$dir/$name" "$set/wav.scp" "${@/%//valid.cer_ctc.best.pth}" \
        -- "$python" -m posinv.bin.ctc_inference --heads "$@" --out "${out[@]}" \
        --wav_scp "$dir/$name/part{job}/list" --ngpu "$((ngpu > 0))"
    for head in "$@"; do
        mkdir -p "$head/$name"
        merge_parts "${out[0]}" "$head/$name/text"
        out=("${out[@]:1}")
    done
}

pr_heads=()
asr_heads=()
for lr in ${pr_lrs:-config}; do
    train_head pr "$lr" "$pr_config" phn word "$tokens_dir/phn.txt"
    pr_heads+=("$dir/pr/lr_$lr")
done
for lr in ${asr_lrs:-config}; do
    train_head asr "$lr" "$asr_config" text "$asr_token_type" "$tokens_dir/$asr_token_type.txt"
    asr_heads+=("$dir/asr/lr_$lr")
done
decode "$valid_set" decode_valid "${pr_heads[@]}" "${asr_heads[@]}"
run_logged "$dir/pr/choose.log" "$python" -m posinv.bin.choose_head --heads "${pr_heads[@]}" \
    --decoded decode_valid/text --ref "$valid_set/phn" --unit phone --out "$dir/pr/best"
run_logged "$dir/asr/choose.log" "$python" -m posinv.bin.choose_head --heads "${asr_heads[@]}" \
    --decoded decode_valid/text --ref "$valid_set/text" --unit word --out "$dir/asr/best"

decode "$test_set" decode "$dir/pr/best" "$dir/asr/best"
for task in pr:phn:phone asr:text:word; do
    IFS=: read -r name text unit <<< "$task"
    run_logged "$dir/$name/best/decode/score.log" "$python" -m posinv.bin.score_text \
        --ref "$test_set/$text" --hyp "$dir/$name/best/decode/text" --unit "$unit" \
        --utt2set "$test_set/utt2set" --out "$dir/$name/best/decode/scores.json"
done
log "superb: $dir: done"
