#!/usr/bin/env bash
# PR and ASR with SUPERB's recipe: a front end that stays frozen, a small CTC head on the learned
# weighted sum of its layers, greedy decoding, PER and WER. Called by enh.sh for one system.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. ./lib.sh

opt dir "" "where to work; the heads go to <dir>/pr and <dir>/asr"
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
opt seed 1 "of the heads"
opt ngpu 0 "GPUs"
opt python python3 "Python"
parse_options "$@"
. ./path.sh

frontend=(--frontend ssl --frontend_conf "ssl=$ssl")
inputs=()
if [ -d "$ssl" ]; then
    inputs+=("$ssl/config.json" "$ssl/model.safetensors")
fi
if [ -n "$enh_dir" ]; then
    frontend=(--frontend enh_ssl --frontend_conf "ssl=$ssl"
        --frontend_conf "enh_config=$enh_dir/config.yaml"
        --frontend_conf "enh_model=$enh_dir/$enh_checkpoint")
    inputs+=("$enh_dir/config.yaml" "$enh_dir/$enh_checkpoint")
fi

train_head() {  # train_head NAME CONFIG TEXT TOKEN_TYPE TOKENS
    local name=$1 config=$2 text=$3 token_type=$4 tokens=$5 bpe=()
    if [ "$token_type" = bpe ]; then
        bpe=(--bpemodel "$tokens_dir/bpe.model")
    fi
    train "$dir/$name" "${inputs[@]}" "$config" "$tokens" \
        "$train_set/$text" "$train_set/utt2num_samples" "$valid_set/$text" \
        -- "$python" -m posinv.bin.asr_train --config "$config" "${frontend[@]}" \
        --token_type "$token_type" --token_list "$tokens" "${bpe[@]}" \
        --train_data_path_and_name_and_type "$train_set/wav.scp,speech,sound" \
        --train_data_path_and_name_and_type "$train_set/$text,text,text" \
        --valid_data_path_and_name_and_type "$valid_set/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$valid_set/$text,text,text" \
        --train_shape_file "$train_set/utt2num_samples" \
        --valid_shape_file "$valid_set/utt2num_samples" \
        --seed "$seed"
}

log "superb: $dir: training the phoneme head"
train_head pr "$pr_config" phn word "$tokens_dir/phn.txt"
log "superb: $dir: training the ASR head"
train_head asr "$asr_config" text "$asr_token_type" "$tokens_dir/$asr_token_type.txt"

log "superb: $dir: decoding $test_set"
run_logged "$dir/decode.log" "$python" -m posinv.bin.ctc_inference \
    --heads "$dir/pr" "$dir/asr" --wav_scp "$test_set/wav.scp" --ngpu "$ngpu"
for task in pr:phn:phone asr:text:word; do
    IFS=: read -r name text unit <<< "$task"
    run_logged "$dir/$name/decode/score.log" "$python" -m posinv.bin.score_text \
        --ref "$test_set/$text" --hyp "$dir/$name/decode/text" --unit "$unit" \
        --utt2set "$test_set/utt2set" --out "$dir/$name/decode/scores.json"
done
log "superb: $dir: done"
