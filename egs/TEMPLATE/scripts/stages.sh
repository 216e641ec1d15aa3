# Stages of a recipe. A stage is written like this: if begin_stage 1 "data"; then ...; end_stage; fi
# shellcheck shell=bash
# shellcheck disable=SC2154  # stage, stop_stage, skip_stages, skip_train, skip_eval: options

_open_stages=()
_stage_times=()

# begin_stage NUMBER TITLE [train|eval]: whether the options say that this stage runs.
begin_stage() {
    local number=$1 skipped=
    if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then
        return 1
    fi
    if [[ " $skip_stages " == *" $number "* ]]; then
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
    _stage_title="stage $number ($2)"
    _open_stages+=("$number $SECONDS")
}

# end_stage: wait for the jobs of the stages that have begun, and say how long these took.
end_stage() {
    local entry
    wait_jobs
    for entry in "${_open_stages[@]}"; do
        log "stage ${entry% *}: done in $((SECONDS - ${entry#* })) s"
        _stage_times+=("${entry% *}: $((SECONDS - ${entry#* })) s")
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
