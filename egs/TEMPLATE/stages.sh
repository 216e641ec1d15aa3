# What enh.sh and ssft.sh share: options, and the functions their stages are made of. Sourced after
# lib.sh; then come the options of the one, parse_options, and set_up.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034  # opt assigns the options; the scripts that source this use what it sets

opt stage 1 "first stage to run"
opt stop_stage 100 "last stage to run"
opt skip_stages "" "stages to leave out, such as '4 5'"
opt ngpu 0 "GPUs for a training (0: CPU)"
opt nj 2 "processes for data preparation and scoring"
opt num_nodes "$num_nodes" "machines for a training, each with --ngpu GPUs"
opt train_nj 2 "trainings, and systems evaluated, at once (on one machine they share its GPUs)"
opt inference_nj 1 "parts that a list is enhanced or decoded in, all at once"
opt cmd_backend "$cmd_backend" "where jobs run: local (here) or slurm"
opt slurm_conf "$slurm_conf" "options of SLURM's jobs"
opt dumpdir dump "formatted data"
opt expdir exp "models and results"
opt python python3 "Python"
opt seeds 1 "seeds of fine-tuning and heads; the table has mean and standard deviation over them"
opt title "Results" "heading of the results"
opt results RESULTS.md "the table, in Markdown"
opt published "" "YAML list of published error rates, which the table has beside ours"

opt train_set train "training set, in data/"
opt valid_set dev "validation set"
opt test_set test "test set; the noisy test sets are made from it"
opt local_data_opts "" "options for local/data.sh"
opt resample false "resample audio that is not at 16 kHz (true), or refuse it (false)"

opt seen_noises "white pink babble hum" "noises of the training set and of the seen test set"
opt unseen_noises "brown modulated impulsive" "noises of the unseen test set"
opt recorded_noise false "NOISE_SEEN and NOISE_UNSEEN of db.sh: false: not used; true: they join; only: no others"
opt test_snrs "5 10 15 20" "SNRs in dB of the test sets"
opt noise_seed 0 "of the noise draw"

opt ssl_model "" "SSL model: hub name or folder; empty: pretrain a small one here"
opt ssl_config conf/ssl.yaml "of that pretraining"
opt ssl_units 50 "k-means units of that pretraining"

opt asr_token_type char "tokens of ASR: char, word or bpe"
opt token_sets "" "sets in data/ whose phonemes and letters the heads know; empty: the training set"
opt nbpe 100 "pieces of the sentencepiece model, for bpe"
opt pr_config conf/pr.yaml "phoneme recognition head"
opt asr_config conf/asr.yaml "speech recognition head"
opt pr_lrs "" "learning rates tried for it, the best on the validation set kept; empty: its own"
opt asr_lrs "" "learning rates tried for it, likewise"

# set_up CONDITION ...: check the options, and name what they lead to. The test sets are
# <test_set>_<CONDITION>.
set_up() {
    conditions=("$@")
    test_sets=("${conditions[@]/#/${test_set}_}")
    sampling_rate=16000
    raw=$dumpdir/raw
    tokens=$dumpdir/tokens
    ssl=${ssl_model:-$expdir/ssl/model}
    check_cmd_backend
    case $resample in
        true) resampling=(--resample) ;;
        false) resampling=() ;;
        *) die "--resample $resample: must be true or false" ;;
    esac
    case $recorded_noise in
        true | false | only) ;;
        *) die "--recorded_noise $recorded_noise: must be true, false or only" ;;
    esac
    case $asr_token_type in
        char | word | bpe) ;;
        *) die "--asr_token_type $asr_token_type: must be char, word or bpe" ;;
    esac
}

# ------------------------------------------------------------------------------------- data
# xargs splits the options as the shell does, quotes included, and expands nothing.
prepare_data() {
    xargs local/data.sh <<< "$local_data_opts"
}

# noisy SOURCE TAG KIND SNRS [ARG ...]: data/<SOURCE>_<TAG>, with the noises of KIND, seen or unseen.
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
        "${resampling[@]}" "$@"
}

make_noisy_test_sets() {
    local condition
    for condition in "${conditions[@]}"; do
        case $condition in
            clean) ;;
            seen | unseen) noisy "$test_set" "$condition" "$condition" "$test_snrs" ;;
            shift) noisy "$test_set" shift seen "$test_snrs" --silence 0.2 1.0 ;;
            rate) noisy "$test_set" rate seen "$test_snrs" --speeds "0.85 1.15" ;;
            *) die "no such condition: $condition; there are clean, seen, unseen, shift and rate" ;;
        esac
    done
}

format() {  # format SOURCE NAME: data/<SOURCE> to $raw/<NAME>
    run_job data "$raw/log/$2.log" "$python" -m posinv.bin.format_data --src "data/$1" \
        --out "$raw/$2" --sampling_rate "$sampling_rate" --nj "$nj" "${resampling[@]}"
}

token_list() {  # token_list FILE TYPE OUT [ARG ...]
    local file=$1 type=$2 out=$3 set texts=()
    shift 3
    for set in ${token_sets:-$train_set}; do
        texts+=("data/$set/$file")
    done
    awk 1 "${texts[@]}" > "$tokens/$file"
    run_logged "$tokens/log/$(basename "$out").log" "$python" -m espnet2.bin.tokenize_text \
        --input "$tokens/$file" --output "$out" --field 2- --token_type "$type" \
        --write_vocabulary true --add_symbol "<blank>:0" --add_symbol "<unk>:1" \
        --add_symbol "<sos/eos>:-1" "$@"
}

# format_sets [SET ...]: the sets of every recipe, and these; token lists; all of it checked.
format_sets() {
    local set file condition
    for set in "$train_set" "$valid_set" "$@"; do
        format "$set" "$set"
    done
    for condition in "${conditions[@]}"; do
        case $condition in
            clean) format "$test_set" "${test_set}_clean" ;;
            *) format "${test_set}_$condition" "${test_set}_$condition" ;;
        esac
    done
    # One list of all test sets, so that each system is enhanced and decoded by one command.
    rm -rf "$raw/test_all"
    mkdir -p "$raw/test_all.partial"
    for file in wav.scp spk1.scp text phn utt2num_samples; do
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
    for set in "$train_set" "$valid_set" "${test_sets[@]}"; do
        run_job data "$raw/log/validate_$set.log" "$python" -m posinv.bin.validate_data "$raw/$set" \
            --sampling_rate "$sampling_rate" --nj "$nj" "${check[@]}"
    done
}

# for_all "NAME ..." FUNCTION: FUNCTION NAME SEED for every name and seed, --train_nj at once.
for_all() {
    local seed name
    set_max_jobs "$train_nj"
    for seed in $seeds; do
        for name in $1; do
            queue "$2" "$name" "$seed"
        done
    done
    wait_jobs
}

# ------------------------------------------------------------------------------- SSL models
prepare_ssl() {
    if [ -n "$ssl_model" ]; then
        log "using the SSL model $ssl_model"
        return
    fi
    local set opts
    for set in "$train_set" "$valid_set"; do
        # A finished training keeps what it was made from; train tells if that was something else.
        [ ! -e "$expdir/ssl/finished" ] || break
        opts=(--num_units "$ssl_units")
        if [ "$set" = "$valid_set" ]; then
            opts=(--kmeans "$expdir/ssl/units_$train_set/kmeans.npz")
        fi
        run_job data "$expdir/ssl/log/units_$set.log" "$python" -m posinv.bin.pretrain_units \
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
    export_ssl "$expdir/ssl"
}

# export_ssl DIR: DIR/model, of what was trained in DIR.
export_ssl() {
    if [ -e "$1/model/config.json" ]; then
        log "$1/model: exported already: kept"
    else
        run_logged "$1/export.log" "$python" -m posinv.bin.export --exp "$1" --out "$1/model" \
            --name "$(basename "$1")"
    fi
}

# ------------------------------------------------------------------------------- evaluation
# recognise DIR SSL_MODEL SEED [ARG ...]: PR and ASR in DIR/superb (superb.sh).
recognise() {
    local dir=$1 model=$2 seed=$3
    shift 3
    run_logged "$dir/superb/superb.log" ./superb.sh --dir "$dir/superb" --ssl "$model" \
        --seed "$seed" --train_set "$raw/$train_set" --valid_set "$raw/$valid_set" \
        --test_set "$raw/test_all" --tokens_dir "$tokens" --pr_config "$pr_config" \
        --asr_config "$asr_config" --asr_token_type "$asr_token_type" --pr_lrs "$pr_lrs" \
        --asr_lrs "$asr_lrs" --ngpu "$ngpu" --num_nodes "$num_nodes" \
        --inference_nj "$inference_nj" --cmd_backend "$cmd_backend" --slurm_conf "$slurm_conf" \
        --python "$python" "$@"
}
