# Stages of a recipe. A stage is written like this: if begin_stage 1 "data"; then ...; end_stage; fi
# shellcheck shell=bash
# shellcheck disable=SC2154  # stage, stop_stage, skip_stages, skip_train, skip_eval, expdir: options

_open_stages=()
_stage_times=()

# runs_stage NUMBER: whether --stage, --stop_stage and --skip_stages let this stage run.
runs_stage() {
    [ "$1" -ge "$stage" ] && [ "$1" -le "$stop_stage" ] && [[ " $skip_stages " != *" $1 "* ]]
}

# begin_stage NUMBER TITLE [train|eval]: whether the options say that this stage runs.
begin_stage() {
    local number=$1 skipped=
    if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then
        return 1
    fi
    if ! runs_stage "$number"; then
        skipped=--skip_stages
    elif [ "$skip_train" = true ] && [ "${3:-}" = train ]; then
        skipped=--skip_train
    elif [ "$skip_eval" = true ] && [ "${3:-}" = eval ]; then
        skipped=--skip_eval
    fi
    if [ -n "$skipped" ]; then
        log "stage $number: $2: skipped ($skipped)"
        return 1
    fi
    log "stage $number: $2"
    _stage_number=$number
    _stage_title="stage $number ($2)"
    _open_stages+=("$number $SECONDS $2")
}

# end_stage: wait for the jobs of the stages that have begun, and say how long these took, also in
# $expdir/stages.tsv, for the report. If several stages have begun, the time of each ends with its own last job.
end_stage() {
    local entry number start title end now record=$expdir/stages.tsv
    wait_jobs
    printf -v now '%(%s)T' -1
    for entry in "${_open_stages[@]}"; do
        read -r number start title <<< "$entry"
        end=$SECONDS
        if [ "${#_open_stages[@]}" -gt 1 ]; then
            end=$(awk -v stage="$number" -v end="$start" \
                '$1 == stage && $2 > end { end = $2 } END { print end }' <<< "$_job_ends")
        fi
        log "stage $number: done in $((end - start)) s"
        _stage_times+=("$number: $((end - start)) s")
        mkdir -p "$expdir"
        [ -e "$record" ] || printf 'stage\ttitle\tseconds\tended\tcommand\n' > "$record"
        printf '%s\t%s\t%s\t%s\t%s\n' "$number" "$title" $((end - start)) \
            "$(TZ=UTC0 printf '%(%Y-%m-%d %H:%M)T' $((now - SECONDS + end)))" \
            "${RECIPE_COMMAND:-$0}" >> "$record"
    done
    _open_stages=()
}

# end_recipe: say how long all of it took, stage by stage.
end_recipe() {
    local times
    [ "${#_stage_times[@]}" -gt 0 ] || return 0
    printf -v times ', %s' "${_stage_times[@]}"
    log "all done in $SECONDS s; stages ${times#, }"
}
