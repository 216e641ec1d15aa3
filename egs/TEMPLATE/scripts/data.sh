# Data: data/ by the recipe's local/data.sh, noisy sets, dump/raw, token lists.
# shellcheck shell=bash
# shellcheck disable=SC2154  # recipe.sh sets the options

# prepare_data: run local/data.sh. xargs splits the options at spaces, except within quotes, and expands
# nothing.
prepare_data() {
    attend xargs local/data.sh <<< "$local_data_opts"
}

# noisy SOURCE TAG KIND SNRS [ARG ...]: make data/<SOURCE>_<TAG>, data/<SOURCE> mixed with the noises of
# KIND: seen or unseen.
noisy() {
    # shellcheck disable=SC1091
    . ./db.sh
    local source=$1 tag=$2 noises=$3_noises recordings=NOISE_${3^^} snrs=$4
    shift 4
    noises=${!noises}
    if [ "$recorded_noise" = only ]; then
        [ -n "${!recordings:-}" ] || die "$recordings in db.sh: empty, and --recorded_noise only needs it"
        noises=
    fi
    if [ "$recorded_noise" != false ] && [ -n "${!recordings:-}" ]; then
        require "${!recordings}" "$recordings in db.sh"
        noises+=" recorded"
        set -- "$@" --recorded "${!recordings}"
    fi
    run_job data "data/log/$source.$tag.log" "$python" -m posinv.bin.mix_noise \
        --src "data/$source" --out "data/${source}_$tag" --tag "$tag" --seed "$noise_seed" \
        --noise_types "$noises" --snrs "$snrs" --babble_src "data/$train_set" --nj "$nj" \
        --on_bad_utt "$on_bad_utt" "${resampling[@]}" "$@"
}

# make_noisy_test_sets: data/<test_set>_<condition> for each condition but clean.
make_noisy_test_sets() {
    local condition
    for condition in "${conditions[@]}"; do
        case $condition in
            clean | noisy) ;;
            seen | unseen) noisy "$test_set" "$condition" "$condition" "$test_snrs" ;;
            shift) noisy "$test_set" shift seen "$test_snrs" --silence 0.2 1.0 ;;
            rate) noisy "$test_set" rate seen "$test_snrs" --speeds "0.85 1.15" ;;
        esac
    done
}

# format SOURCE NAME [ARG ...]: make $raw/<NAME> from data/<SOURCE>; $alignable says what CTC
# must be able to align.
format() {
    local source=$1 name=$2
    shift 2
    run_job data "$raw/log/$name.log" "$python" -m posinv.bin.format_data --src "data/$source" \
        --out "$raw/$name" --sampling_rate "$sampling_rate" --nj "$nj" "${alignable[@]}" \
        --on_bad_utt "$on_bad_utt" "${resampling[@]}" "$@"
    if [ -e "$raw/$name/skipped" ]; then
        log "$raw/$name: $(wc -l < "$raw/$name/skipped") bad utterances left out: $raw/$name/skipped says why"
    fi
}

# token_list FILE TYPE OUT [ARG ...]: make OUT, the tokens in data/<set>/FILE of the sets in --token_sets.
token_list() {
    local file=$1 type=$2 out=$3 set texts=()
    shift 3
    for set in ${token_sets:-$train_set}; do
        texts+=("data/$set/$file")
    done
    awk 1 "${texts[@]}" > "$tokens/$file"
    run_here "$tokens/log/$(basename "$out").log" "$python" -m espnet2.bin.tokenize_text \
        --input "$tokens/$file" --output "$out.partial" --field 2- --token_type "$type" \
        --write_vocabulary true --add_symbol "<blank>:0" --add_symbol "<unk>:1" \
        --add_symbol "<sos/eos>:-1" "$@"
    mv "$out.partial" "$out"
}

# format_sets: format the clean speech of the training and validation set, and the test sets; make the
# token lists and the search of --qbe; check all of it.
format_sets() {
    local set file condition
    for set in "$train_set" "$valid_set"; do
        format "$set" "$set" --clean
    done
    for condition in "${conditions[@]}"; do
        case $condition in
            clean) format "$test_set" "${test_set}_clean" --clean ;;
            noisy) format "$test_set" "${test_set}_noisy" ;;
            *) format "${test_set}_$condition" "${test_set}_$condition" ;;
        esac
    done
    # One list of all test sets, so that each system is enhanced and decoded by one command.
    rm -rf "$raw/test_all" "$raw/test_all.partial"
    mkdir -p "$raw/test_all.partial"
    for file in wav.scp spk1.scp text phn utt2num_samples utt2digest; do
        for set in "${test_sets[@]}"; do
            cat "$raw/$set/$file"
        done | LC_ALL=C sort > "$raw/test_all.partial/$file"
    done
    for set in "${test_sets[@]}"; do
        sed "s/ .*/ $set/" "$raw/$set/wav.scp"
    done | LC_ALL=C sort > "$raw/test_all.partial/utt2set"
    mv "$raw/test_all.partial" "$raw/test_all"

    mkdir -p "$tokens"
    token_list phn word "$tokens/phn.txt"
    if [ "$asr_token_type" = bpe ]; then
        run_here "$tokens/log/sentencepiece.log" "$python" -m posinv.bin.train_sentencepiece \
            --text "$raw/$train_set/text" --size "$nbpe" --out "$tokens/bpe.model"
        token_list text bpe "$tokens/bpe.txt" --bpemodel "$tokens/bpe.model"
    else
        token_list text "$asr_token_type" "$tokens/$asr_token_type.txt"
    fi
    local check=(--phn_tokens "$tokens/phn.txt")
    if [ "$asr_token_type" != bpe ]; then
        check+=("--${asr_token_type}_tokens" "$tokens/$asr_token_type.txt")
    fi
    prepare_qbe
    for set in "$train_set" "$valid_set" "${test_sets[@]}"; do
        run_job data "$raw/log/validate_$set.log" "$python" -m posinv.bin.validate_data "$raw/$set" \
            --sampling_rate "$sampling_rate" --nj "$nj" "${check[@]}"
    done
}
