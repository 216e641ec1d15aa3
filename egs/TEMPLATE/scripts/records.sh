# What a result was made from: records of a command and of its inputs' checksums. A result whose
# inputs have changed since is made again or refused.
# shellcheck shell=bash
# shellcheck disable=SC2154  # python, seeds, systems, expdir, ssl_model: the recipe's

# split_inputs DIR INPUT ... -- COMMAND [ARG ...]: set the caller's arrays inputs and command, and sums:
# the inputs' checksums as comment lines, for the record of what DIR was made from.
split_inputs() {
    local dir=$1
    shift
    inputs=()
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    # shellcheck disable=SC2034  # the caller's
    command=("$@")
    sums=$(_checksums "${inputs[@]}") || die "${_stage_title:-jobs}: $dir: an input can't be read"
}

_checksums() {
    echo "# Its inputs, as cksum prints them:"
    cksum -- "$@" | sed 's/^/#   /'
}

# record_inputs RESULT INPUT ...: write RESULT.inputs, which check_records reads.
record_inputs() {
    local result=$1
    shift
    into "$result.inputs" _checksums "$@"
}

# check_records DIR ...: end with an error if an input of a result in DIR has changed since.
check_records() {
    local record sums inputs unused=()
    # Searches of an earlier run are not in a table without --qbe.
    [ "$qbe" = true ] || unused=(-name qbe -prune -o)
    while IFS= read -r -d '' record; do
        sums=$(sed -n 's/^#   //p' "$record")
        mapfile -t inputs < <(cut -d ' ' -f 3- <<< "$sums")
        [ "$(cksum -- "${inputs[@]}" 2>&1)" = "$sums" ] || die "${record%.inputs}: $(
            diff <(cksum -- "${inputs[@]}" 2>&1) - <<< "$sums" | sed -n 's/^> [0-9]* [0-9]* //p' \
                | paste -sd ' '
        ) changed after this was made: run the earlier stages again, or choose another --expdir"
    done < <(find -L "$@" "${unused[@]}" \( -name run.sh -o -name part.sh -o -name '*.inputs' \) -print0)
}

# check_systems: check_records of the SSL model pretrained here, and of each system and seed.
check_systems() {
    local seed system
    [ -n "$ssl_model" ] || check_records "$expdir/ssl"
    for seed in $seeds; do
        for system in $systems; do
            check_records "$expdir/seed$seed/$system"
        done
    done
}

# same_training DIR RECORD: end with an error that names what differs, if RECORD is of another training
# than the one DIR was made by; only --max_epoch may have grown, or the list of heads have changed,
# which resumes it; what was exported of it is removed.
same_training() {
    [ "$(cat "$1/run.sh")" != "$2" ] || return 0
    "$python" -m posinv.bin.compare_trainings --dir "$1" --record "$2" || exit 1
    rm -rf "$1/finished" "$1/model"
}

# keep_record DIR RECORD INPUT ...: write DIR/run.sh, and copies of the YAML files among the inputs.
keep_record() {
    local dir=$1 record=$2 input
    shift 2
    rm -rf "$dir/inputs"
    mkdir -p "$dir/inputs"
    for input in "$@"; do
        case $input in *.yaml) cp "$input" "$dir/inputs/${input//\//%}" ;; esac
    done
    into "$dir/run.sh" echo "$record"
    chmod +x "$dir/run.sh"
}
