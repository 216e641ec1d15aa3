# Jobs: commands with a log, here or on a SLURM cluster, alone, side by side, or in parts.
# shellcheck shell=bash
# shellcheck disable=SC2154  # cmd_backend, slurm_conf, num_nodes, ngpu, inference_gpu, nj, inference_nj, train_nj, expdir: the recipe's

check_cmd_backend() {
    if [ "$cmd_backend" = slurm ]; then
        command -v sbatch > /dev/null || die "--cmd_backend slurm: there is no sbatch on this machine"
        require "$slurm_conf" "the options of SLURM's jobs (--slurm_conf)"
        name_slurm_jobs "$(basename "$PWD").$(uname -n).$$"
    elif [ "$num_nodes" -gt 1 ] && [ "$ngpu" -gt 0 ]; then
        die "--num_nodes $num_nodes: several machines with GPUs need --cmd_backend slurm"
    fi
}

# use_threads JOBS: set the number of threads of a job that shares this machine with others, JOBS in
# all. A thread that waits must not keep a processor busy meanwhile: on a shared machine that has
# made an LSTM 70 times slower.
use_threads() {
    OMP_NUM_THREADS=$(($(nproc) / $1 > 0 ? $(nproc) / $1 : 1))
    export OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE
}
use_threads 1

# use_fork_server: let python3 stand for forks of one process that has imported torch and ESPnet, until
# this script ends. fork_server.py tells why. $POSINV_FORK_SERVER is the folder of one that runs.
use_fork_server() {
    if [ "$cmd_backend" != local ] || [ "$ngpu" -gt 0 ] || [ "$inference_gpu" -gt 0 ] \
        || [ "$stage" -ge "$last_stage" ]; then
        return
    fi
    if [ -z "${POSINV_FORK_SERVER:-}" ]; then
        _fork_server=$(mktemp -d)
        if [ "${#_fork_server}" -gt 80 ]; then  # the path of a socket has 104 characters at most
            return
        fi
        POSINV_FORK_SERVER=$_fork_server
        attend python3 scripts/fork_server.py start "$POSINV_FORK_SERVER" $$
    fi
    PATH=$POSINV_FORK_SERVER/bin:$PATH
}

# ------------------------------------------------------------------------------ side by side
# queue FUNCTION [ARG ...]: run FUNCTION in the background, at most --train_nj at once. wait_jobs
# waits for all of them, and fails if one failed. A stage's first job is not started if a job of the
# stage before has failed by then.
_jobs_queued=0
_jobs_done=
_jobs_of=  # titles of the stages whose jobs are queued
_job_ends=  # lines "STAGE SECONDS" of the jobs that wait_jobs has waited for: when they ended
declare -A _job_pids=()
queue() {
    local title=${_stage_title:-jobs}
    while [ "$(jobs -rp | wc -l)" -ge "$train_nj" ]; do
        _show_progress
    done
    # A line in a file for each job that ends well, since bash forgets the exit status of a job
    # whose process id is used again.
    _jobs_done=${_jobs_done:-$(mktemp)}
    if [[ $_jobs_of != *"$title" ]]; then
        if [ $((_jobs_queued - $(jobs -rp | wc -l))) -gt "$(wc -l < "$_jobs_done")" ]; then
            wait_jobs
        fi
        _jobs_of+=${_jobs_of:+, }$title
    fi
    (
        use_threads "$train_nj"
        "$@"
        echo "${_stage_number:-0} $SECONDS $*" >> "$_jobs_done"
    ) &
    _job_pids["$*"]=$!
    _jobs_queued=$((_jobs_queued + 1))
}

wait_jobs() {
    local failed of=$_jobs_of
    [ "$_jobs_queued" -gt 0 ] || return 0
    while [ -n "$(jobs -rp)" ]; do
        _show_progress
    done
    wait
    failed=$((_jobs_queued - $(wc -l < "$_jobs_done")))
    _job_ends=$(cut -d ' ' -f 1,2 "$_jobs_done")
    rm -f "$_jobs_done"
    _jobs_queued=0
    _jobs_done=
    _jobs_of=
    _job_pids=()
    if [ "$failed" -gt 0 ]; then
        die "$of: $failed of the jobs failed"
    fi
}

# after JOB FUNCTION [ARG ...]: run FUNCTION when JOB, a function with its arguments, has ended; fail if it
# failed. If it is not queued, run FUNCTION at once. For use with queue.
after() {
    local job=$1
    shift
    if [ -n "${_job_pids[$job]:-}" ]; then
        while kill -0 "${_job_pids[$job]}" 2> /dev/null; do
            sleep 0.5
        done
        if ! cut -d ' ' -f 3- "$_jobs_done" | grep -qxF -- "$job"; then
            log "$*: left out, since this failed: $job"
            return 1
        fi
    fi
    "$@"
}

# Sleep a little; on a terminal, show the epoch of each training that is under way.
_show_progress() {
    local training epoch line=""
    sleep 0.5
    [ -t 2 ] || return 0
    while IFS= read -r -d '' training; do
        epoch=$(grep -ao '[0-9]*/[0-9]*epoch started' "$training" | tail -n 1 || true)
        line+="${training%/train.log}: epoch ${epoch%epoch*}   "
    done < <(find "$expdir" -name train.log -mmin -1 ! -execdir test -e finished \; -print0)
    printf '\r\033[K%s\r' "${line:0:$(tput cols 2> /dev/null || echo 80)}" >&2
}

# -------------------------------------------------------------------------------- a command
# attend COMMAND [ARG ...]: run COMMAND in the background and wait for it. Bash runs a signal's trap only
# after a command in the foreground has ended, but at once during wait.
attend() {
    "$@" <&0 &
    wait "$!"
}

_log_to() {  # _log_to LOG COMMAND [ARG ...]
    "${@:2}" >> "$1" 2>&1 < /dev/null
}

# run_job KIND LOG COMMAND [ARG ...]: run COMMAND with its output in LOG; if it fails, print LOG's
# name and the error in it. KIND is train (on --num_nodes machines with --ngpu GPUs each), decode
# (with one GPU, if --gpu_inference asks for it) or data (--nj processes).
run_job() {
    local kind=$1 log=$2
    shift 2
    _begin_log "$log" "$@"
    if [ "$cmd_backend" = local ]; then
        attend _log_to "$log" "$@" || _job_failed "$log"
    else
        attend _sbatch "$kind" "${log//%/%%}" "$log" <<< "exec$(printf ' %q' "$@")" \
            || _job_failed "$log"
    fi
}

# run_here LOG COMMAND [ARG ...]: run_job, on this machine: for what takes a moment.
run_here() {
    local cmd_backend=local
    run_job here "$@"
}

# --------------------------------------------------------------------------------- in parts
# run_parts DIR LIST INPUT ... -- COMMAND [ARG ...]: a decode job for each of --inference_nj parts of
# LIST, all at once. {job} in COMMAND stands for a part's number; DIR/part{job} holds its lines of
# LIST, "list", its "log", and "done" when it is. Parts that this command did before, with LIST and
# the INPUT files as they are, are kept. Leaves the number of parts in $num_parts.
run_parts() {
    # shellcheck disable=SC2034  # split_inputs sets it
    local inputs
    local dir=$1 list=$2 command sums lines record job todo=() failed=0
    shift
    split_inputs "$dir" "$@"
    lines=$(wc -l < "$list")
    num_parts=$((inference_nj < lines ? inference_nj : lines))
    # shellcheck disable=SC2016  # $1, of the job
    record=$(
        echo '#!/usr/bin/env bash'
        echo "# Part \$1 of $num_parts; run in $PWD, after . ./path.sh"
        echo "$sums"
        echo 'set -euo pipefail'
        echo "command=($(printf ' %q' "${command[@]}") )"
        echo '"${command[@]//\{job\}/$1}"'
        echo "touch $(printf '%q' "$dir")/part\"\$1\"/done"
    )
    if [ "$(cat "$dir/part.sh" 2> /dev/null)" != "$record" ]; then
        rm -f "$dir/part.sh"
        rm -rf "$dir"/part*
        mkdir -p "$dir"
        echo "$record" > "$dir/part.sh.partial"
        for ((job = 1; job <= num_parts; job++)); do
            mkdir "$dir/part$job"
            awk -v n="$num_parts" -v lines="$lines" -v job="$job" \
                'int((NR - 1) * n / lines) + 1 == job' "$list" > "$dir/part$job/list"
        done
        mv "$dir/part.sh.partial" "$dir/part.sh"
    fi
    for ((job = 1; job <= num_parts; job++)); do
        if [ ! -e "$dir/part$job/done" ]; then
            todo+=("$job")
            _begin_log "$dir/part$job/log" bash "$dir/part.sh" "$job"
        fi
    done
    if [ "${#todo[@]}" -lt "$num_parts" ]; then
        log "$dir: $((num_parts - ${#todo[@]})) of $num_parts parts done already, by this command from these inputs: kept"
    fi
    [ "${#todo[@]}" -gt 0 ] || return 0
    if [ "$cmd_backend" = local ]; then
        _parts_here "$dir" "${todo[@]}" || failed=1
    else
        attend _sbatch decode "${dir//%/%%}/part%a/log" "$dir/part${todo[0]}/log" \
            --array="$(IFS=,; echo "${todo[*]}")" \
            <<< "exec bash $(printf '%q' "$dir/part.sh") \"\$SLURM_ARRAY_TASK_ID\"" || failed=1
    fi
    if [ "$failed" = 1 ]; then
        for job in "${todo[@]}"; do
            [ -e "$dir/part$job/done" ] || _job_failed "$dir/part$job/log" || true
        done
        return 1
    fi
}

# merge_parts PART WHOLE: the files PART of run_parts' parts, {job} in their names, in order.
merge_parts() {
    local job parts=()
    for ((job = 1; job <= num_parts; job++)); do
        parts+=("${1//\{job\}/$job}")
    done
    into "$2" cat "${parts[@]}"
}

_parts_here() {  # _parts_here DIR PART ...
    local dir=$1 job pids=() devices failed=0
    shift
    # The parts share the GPUs and the processors.
    IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((ngpu > 0 ? ngpu - 1 : 0)))}"
    for job in "$@"; do
        (
            if [ "$ngpu" -gt 1 ]; then
                export CUDA_VISIBLE_DEVICES=${devices[job % ${#devices[@]}]}
            fi
            export OMP_NUM_THREADS=$((OMP_NUM_THREADS / $# > 0 ? OMP_NUM_THREADS / $# : 1))
            exec bash "$dir/part.sh" "$job" >> "$dir/part$job/log" 2>&1 < /dev/null
        ) &
        pids+=($!)
    done
    for job in "${pids[@]}"; do
        wait "$job" || failed=1
    done
    return "$failed"
}

_begin_log() {  # _begin_log LOG COMMAND [ARG ...]
    local log=$1
    shift
    mkdir -p "$(dirname "$log")"
    {
        printf '# %s\n#' "$(date -u '+%Y-%m-%d %H:%M:%S UTC')"
        printf ' %q' "$@"
        printf '\n'
    } > "$log"
}

# srun and torchrun end with an error of their own, which isn't the cause.
_job_failed() {  # _job_failed LOG
    local cause
    cause=$(grep -a ' error: \|Error: \|^error: ' "$1" \
        | grep -av '^srun: error\|ChildFailedError' | tail -n 1 || true)
    echo "error: ${_stage_title:-a command} failed; log: $1" >&2
    # What there was no room for can't be read in the log.
    if ! { head -c 65536 /dev/zero > "$1.room"; } 2> /dev/null; then
        cause="$(dirname "$1"): can't be written, or no space is left: make room, and start the same command again"
    fi
    rm -f "$1.room"
    echo "${cause:-$(tail -n 1 "$1")}" >&2
    return 1
}

# ------------------------------------------------------------------------------------ SLURM
# _sbatch KIND OUTPUT LOG [OPTION ...] < SCRIPT: submit a job, and wait for it. Its output goes to
# OUTPUT, sbatch's own to LOG. The options in $slurm_conf count over those that come from here.
_sbatch() {
    local kind=$1 output=$2 log=$3 options=() gpus=0 name value
    shift 3
    case $kind in
        train)
            options=(--nodes="$num_nodes" --ntasks-per-node=1)
            gpus=$ngpu
            ;;
        decode) gpus=$inference_gpu ;;
        data) options=(--cpus-per-task="${nj:-1}") ;;
    esac
    if [ "$gpus" -gt 0 ]; then
        options+=(--gres=gpu:"$gpus")
    fi
    while read -r name value; do
        if [ "$name" = all ] || [ "$name" = "$kind" ]; then
            # shellcheck disable=SC2206  # a list
            options+=($value)
        fi
    done < "$slurm_conf"
    {
        echo '#!/usr/bin/env bash'
        # shellcheck disable=SC2016  # of the job
        echo 'export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}'
        cat
    } | sbatch --wait --job-name="$_slurm_name" --comment="$log" --output="$output" \
        --open-mode=append "${options[@]}" "$@" >> "$log" 2>&1
}
