# Query-by-example search: spoken queries in spoken documents, by subsequence DTW on one layer of the
# SSL model, as S3PRL's quesst14_dtw; the maximum term weighted value (MTWV). Nothing is trained.
# shellcheck shell=bash
# shellcheck disable=SC2154  # recipe.sh sets the options

# prepare_qbe: make $qbe_search, the search of data/<test_set>_queries in the test sets, unless
# --qbe_data names another.
prepare_qbe() {
    # shellcheck disable=SC2034  # of format: queries have no transcripts that a head learns
    local queries=${test_set}_queries alignable=()
    if [ "$qbe" = false ]; then
        return
    elif [ -n "$qbe_data" ]; then
        require "$qbe_data/relevance" "the search that --qbe_data names; see egs/README.md"
        return
    fi
    require "data/$queries/wav.scp" "the words that --qbe true searches: run stage 1, or see egs/README.md"
    format "$queries" "$queries"
    run_here "$raw/log/qbe.log" "$python" -m posinv.bin.prepare_search --queries "$raw/$queries" \
        --documents "$raw/test_all" --out "$qbe_search"
}

# qbe_sets: print the test sets that are searched, for the table; nothing without --qbe true.
qbe_sets() {
    if [ "$qbe" = false ]; then
        return
    elif [ -z "$qbe_data" ]; then
        echo "${test_sets[*]}"
    else
        cut -d ' ' -f 2 "$qbe_search/utt2set" | LC_ALL=C sort -u | paste -sd ' '
    fi
}

# queue_qbe SYSTEM SEED SSL_MODEL [ENHANCEMENT]: queue qbe, if --qbe says so, for when SYSTEM is
# fine-tuned. Models that no seed has changed are searched once, for the first seed; the others have
# links to it.
queue_qbe() {
    local dir=$expdir/seed$2/$1 first=${seeds%% *}
    [ "$qbe" = true ] || return 0
    mkdir -p "$dir"
    if [ "$2" != "$first" ] && [[ " base noisy enh " == *" $1 "* ]]; then
        ln -sfn "../../seed$first/$1/qbe" "$dir/qbe"
    else
        queue after "finetune $1 $2" qbe "$dir/qbe" "$3" "${4:-}"
    fi
}

# qbe DIR SSL_MODEL [ENHANCEMENT]: search with SSL_MODEL, or with it behind the enhancement model in the
# folder ENHANCEMENT; the scores go to DIR/scores.json.
qbe() {
    local dir=$1 model=$2 enhancement=${3:-} frontend=() unsearched=() ssl_files
    require "$qbe_search/relevance" "the search of --qbe true: run stage 3 with it; or see --qbe_data"
    ssl_files_of "$model"
    if [ -n "$enhancement" ]; then
        frontend=(--enh_config "$enhancement/config.yaml" --enh_model "$enhancement/valid.loss.best.pth")
        ssl_files+=("$enhancement/config.yaml" "$enhancement/valid.loss.best.pth")
    fi
    if [ -e "$qbe_search/unsearched" ]; then
        unsearched=(--unsearched "$qbe_search/unsearched")
    fi
    run_job decode "$dir/search.log" "$python" -m posinv.bin.query_search --ssl "$model" \
        "${frontend[@]}" --layer "$qbe_layer" --queries "$qbe_search/queries.scp" \
        --documents "$qbe_search/documents.scp" --utt2set "$qbe_search/utt2set" \
        --relevance "$qbe_search/relevance" "${unsearched[@]}" --ngpu "$inference_gpu" \
        --out "$dir/scores.json"
    record_inputs "$dir/scores.json" "$qbe_search/relevance" "$qbe_search/utt2digest" \
        "$qbe_search/utt2set" "${ssl_files[@]}"
}
