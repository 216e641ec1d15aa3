# What enh.sh and ssft.sh share: their common options, and the functions in the files beside this
# one. A script that sources this sets last_stage first, declares its own options after, and then
# calls start_recipe.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2086,SC2154  # opt assigns the options; the stages use what is set here
. scripts/processes.sh
begin_run "$@"
. ./cmd.sh
. scripts/options.sh
. scripts/stages.sh
. scripts/records.sh
. scripts/jobs.sh
. scripts/train.sh
. scripts/data.sh
. scripts/ssl.sh
. scripts/superb.sh
. scripts/qbe.sh

opt stage 1 "first stage to run" stage "$last_stage"
opt stop_stage "$last_stage" "last stage to run" stage "$last_stage"
opt skip_stages "" "stages to skip, such as '4 5'" some_of $(seq "$last_stage")
opt skip_train false "skip the stages that train SSL and enhancement models" one_of true false
opt skip_eval false "skip the stages that enhance, train heads, decode and score" one_of true false
opt ngpu 0 "GPUs of a training (0: CPU)" integer
opt gpu_inference auto "enhance and decode on a GPU; auto: if --ngpu is not 0" one_of auto true false
opt nj 2 "processes for data preparation and scoring" positive
opt num_nodes "$num_nodes" "machines of a training, each with --ngpu GPUs" positive
opt train_nj 2 "trainings, and systems evaluated, at the same time (on one machine they share its GPUs)" positive
opt inference_nj 1 "parts of a list that are enhanced or decoded at the same time" positive
opt cmd_backend "$cmd_backend" "where jobs run" one_of local slurm
opt slurm_conf "$slurm_conf" "sbatch's options for each kind of job"
opt dumpdir dump "formatted data"
opt expdir exp "models and results"
opt python python3 "Python"
opt seeds 1 "random seeds of fine-tuning and heads; the table has mean and standard deviation over them" integers
opt title "Results" "heading of the results"
opt results "" "Markdown file of the table; empty: RESULTS.md in --expdir"
opt published "" "YAML list of published error rates and MTWVs, shown beside ours" file

opt train_set train "training set, in data/"
opt valid_set dev "validation set"
opt test_set test "test set; the noisy test sets are made from it"
opt local_data_opts "" "options for local/data.sh"
opt on_bad_utt stop "what to do with an utterance whose audio or transcript is bad: end, or leave it out and list it in <dumpdir>/raw/<set>/skipped" one_of stop skip
opt resample false "resample audio that is not at 16 kHz (true), or refuse it (false)" one_of true false

noise_types="white pink hum brown modulated impulsive babble"
opt mix_noise true "make noisy sets by mixing (true), or use the noisy audio in wav.scp with its clean reference in spk1.scp (false)" one_of true false
opt seen_noises "white pink babble hum" "noises of the training set and of the seen test set" some_of $noise_types
opt unseen_noises "brown modulated impulsive" "noises of the unseen test set" some_of $noise_types
opt recorded_noise false "use the recordings in NOISE_SEEN and NOISE_UNSEEN (db.sh): no, too, no other noises" one_of false true only
opt test_snrs "5 10 15 20" "SNRs in dB of the test sets" numbers
opt noise_seed 0 "random seed of the noise" integer

opt ssl_model "" "SSL model: hub name or folder; empty: pretrain a small one here"
opt ssl_config conf/ssl.yaml "configuration of that pretraining"
opt ssl_opts "" "more options for that pretraining, such as '--ssl_conf num_conv_pos_embeddings=128'"
opt ssl_units 50 "k-means units of that pretraining" positive

opt asr_token_type char "tokens of ASR" one_of char word bpe
opt token_sets "" "sets in data/ whose phonemes and letters the heads know; empty: the training set"
opt nbpe 100 "pieces of the sentencepiece model, for bpe" positive
opt pr_config conf/pr.yaml "phoneme recognition head" file
opt asr_config conf/asr.yaml "speech recognition head" file
opt pr_lrs "" "learning rates tried for the PR head, the best on the validation set is kept; empty: its configuration's" numbers
opt asr_lrs "" "learning rates tried for the ASR head, likewise" numbers
opt sweep_updates 0 "updates after which only the learning rate that is best on the validation set goes on; 0: all to the end" integer
opt cache_dir "" "folder for the layers of the training and validation set, in float16, so that each model reads the audio once; empty: none"

opt qbe false "judge by query-by-example search, too: spoken words searched in the test sets, MTWV" one_of true false
opt qbe_data "" "folder with a search of its own (queries.scp, documents.scp, relevance, utt2set, utt2digest), such as QUESST 2014's; empty: data/<test_set>_queries in the test sets"
opt qbe_layer -1 "hidden state of the SSL model that is searched, from 0; -1: the last" numbers

# start_recipe "$@": parse the options, put Python on the PATH, and set what follows from the options.
start_recipe() {
    parse_options "$@"
    check_cmd_backend
    [ "$stage" -le "$stop_stage" ] || die "--stage $stage: no stage to run, since --stop_stage is $stop_stage"
    [ -n "$ssl_model" ] || require "$ssl_config" "--ssl_config, for pretraining; or give an SSL model with --ssl_model"
    for condition in $test_conditions; do
        case $mix_noise:$condition in
            true:noisy) die "--test_conditions noisy: the noisy audio of your own pairs, which needs --mix_noise false" ;;
            false:clean | false:noisy) ;;
            false:*) die "--test_conditions $condition: made by mixing, which --mix_noise false forbids; there are: clean noisy" ;;
        esac
    done
    . ./path.sh
    sampling_rate=16000
    results=${results:-$expdir/RESULTS.md}
    raw=$dumpdir/raw
    tokens=$dumpdir/tokens
    ssl=${ssl_model:-$expdir/ssl/model}
    read -ra conditions <<< "$test_conditions"
    test_sets=("${conditions[@]/#/${test_set}_}")
    qbe_search=${qbe_data:-$raw/qbe}
    resampling=()
    if [ "$resample" = true ]; then
        resampling=(--resample)
    fi
    alignable=(--align "phn=$pr_config")
    if [ "$asr_token_type" != bpe ]; then
        alignable+=("$asr_token_type=$asr_config")
    fi
    case $gpu_inference in
        auto) inference_gpu=$((ngpu > 0)) ;;
        true) inference_gpu=1 ;;
        false) inference_gpu=0 ;;
    esac
    lock_folders
    use_fork_server
}

# lock_folders: keep other runs out of --expdir, and out of the data while this run makes it.
lock_folders() {
    local number
    start_guard "$expdir" data "$dumpdir"
    lock "$expdir" "wait until it ends, end it, or choose another --expdir"
    for number in 1 2 3; do
        if runs_stage "$number"; then
            lock data "wait until it has done stage 3; or use the data that is there, from --stage 4 on"
            lock "$dumpdir" "wait until it ends; or choose another --dumpdir, or use what is there, from --stage 4 on"
            return
        fi
    done
}

# share_data FOLDER ...: the data is made, and is read from now on, in these folders.
share_data() {
    local folder
    unlock data/.lock
    for folder in "$@"; do
        share "$folder" "wait until it has done stage 3"
    done
}

# write_report: write $expdir/report.html, and say where the results are.
write_report() {
    attend "$python" -m posinv.bin.report "$expdir" --systems "$systems" --seeds "$seeds" --title "$title" \
        --command "${RECIPE_COMMAND:-$0}" ${published:+--published "$published"} > /dev/null
    log "the table: $PWD/$results"
    log "the report: $PWD/$expdir/report.html"
    log "models, logs and scores: $PWD/$expdir; training curves: tensorboard --logdir $PWD/$expdir"
}
