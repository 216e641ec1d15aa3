# The SSL model: its pretraining, its export.
# shellcheck shell=bash
# shellcheck disable=SC2154  # recipe.sh sets the options

# ssl_files_of SSL_MODEL: fill the array ssl_files with the files of a model's folder, which are inputs of
# a training; a model of the hub has none.
# shellcheck disable=SC2034  # the caller's
ssl_files_of() {
    ssl_files=()
    if [ -d "$1" ]; then
        ssl_files=("$1/config.json" "$1/model.safetensors")
    fi
}

# prepare_ssl: pretrain the SSL model $ssl, unless --ssl_model names one.
prepare_ssl() {
    if [ -n "$ssl_model" ]; then
        log "using the SSL model $ssl_model"
        return
    fi
    local set opts
    for set in "$train_set" "$valid_set"; do
        # The units of a finished training stay as they are.
        [ ! -e "$expdir/ssl/finished" ] || break
        opts=(--num_units "$ssl_units")
        if [ "$set" = "$valid_set" ]; then
            opts=(--kmeans "$expdir/ssl/units_$train_set/kmeans.npz")
        fi
        run_job data "$expdir/ssl/log/units_$set.log" "$python" -m posinv.bin.pretrain_units \
            --wav_scp "$raw/$set/wav.scp" --out "$expdir/ssl/units_$set" --nj "$nj" "${opts[@]}"
    done
    mapfile -t opts < <(xargs -r printf '%s\n' <<< "$ssl_opts")
    train "$expdir/ssl" "$ssl_config" "$raw/$train_set/utt2digest" "$raw/$valid_set/utt2digest" \
        "$expdir/ssl/units_$train_set/units" \
        -- "$python" -m posinv.bin.pretrain_train --config "$ssl_config" \
        --num_units "$ssl_units" "${opts[@]}" \
        --train_data_path_and_name_and_type "$raw/$train_set/wav.scp,speech,sound" \
        --train_data_path_and_name_and_type "$expdir/ssl/units_$train_set/units,units,text_int" \
        --valid_data_path_and_name_and_type "$raw/$valid_set/wav.scp,speech,sound" \
        --valid_data_path_and_name_and_type "$expdir/ssl/units_$valid_set/units,units,text_int" \
        --train_shape_file "$raw/$train_set/utt2num_samples" \
        --valid_shape_file "$raw/$valid_set/utt2num_samples"
    # The last epoch, as HuBERT's: with minutes of speech the validation loss is noise. In a run of
    # egs/mini/enh1 it was lowest at epoch 3 of 12, on whose features the PR head's error rate on the
    # validation set was 27 %; on those of epoch 12 it was 15 %.
    export_ssl "$expdir/ssl" latest.pth
}

# export_ssl DIR CHECKPOINT: make DIR/model, a folder that transformers loads, from the training in DIR.
export_ssl() {
    if [ -e "$1/model/config.json" ]; then
        log "$1/model: exported already: kept"
    else
        run_here "$1/export.log" "$python" -m posinv.bin.export --exp "$1" --checkpoint "$2" \
            --out "$1/model" --name "$(basename "$1")"
    fi
}
