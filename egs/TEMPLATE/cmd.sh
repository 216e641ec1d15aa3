# Where the recipes' jobs run: on this machine, or on a SLURM cluster. Sourced by lib.sh. What is set
# here are the defaults of the options of these names.
# shellcheck shell=bash
# shellcheck disable=SC2154  # ngpu, nj, inference_nj: options of the caller; _template: lib.sh's

cmd_backend=local  # or slurm
slurm_conf=$(realpath "$_template/../../conf/slurm.conf")
num_nodes=1        # machines of a training

check_cmd_backend() {
    case $cmd_backend in
        local) ;;
        slurm)
            command -v sbatch > /dev/null || die "--cmd_backend slurm: there is no sbatch on this machine"
            require "$slurm_conf" "the options of SLURM's jobs (--slurm_conf)"
            ;;
        *) die "--cmd_backend $cmd_backend: must be local or slurm" ;;
    esac
    if [ "$cmd_backend" = local ] && [ "$num_nodes" -gt 1 ] && [ "$ngpu" -gt 0 ]; then
        die "--num_nodes $num_nodes: several machines with GPUs need --cmd_backend slurm"
    fi
}

# run_job KIND LOG COMMAND [ARG ...]: run COMMAND with its output in LOG; when it fails, name LOG
# and show what it ended with. KIND is train (on --num_nodes machines with --ngpu GPUs each), decode
# (with one GPU if there are any) or data (--nj processes).
run_job() {
    local kind=$1 log=$2
    shift 2
    _begin_log "$log" "$@"
    if [ "$cmd_backend" = local ]; then
        "$@" >> "$log" 2>&1 < /dev/null || _job_failed "$log"
    else
        _sbatch "$kind" "${log//%/%%}" "$log" <<< "exec$(printf ' %q' "$@")" || _job_failed "$log"
    fi
}

# run_logged LOG COMMAND [ARG ...]: run_job, on this machine: for what takes a moment.
run_logged() {
    local cmd_backend=local
    run_job here "$@"
}

# run_parts DIR LIST INPUT ... -- COMMAND [ARG ...]: a decode job for each of --inference_nj parts of
# LIST, all at once. {job} in COMMAND stands for a part's number; DIR/part{job} holds its lines of
# LIST, "list", its "log", and "done" when it is. Parts that this command did before, with LIST and
# the INPUT files as they are, are kept. Leaves the number of parts in $num_parts.
run_parts() {
    local dir=$1 list=$2 inputs=("$2") lines sums record job todo=() failed=0
    shift 2
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    sums=$(cksum -- "${inputs[@]}") || die "${_stage_title:-jobs}: $dir: an input can't be read"
    lines=$(wc -l < "$list")
    num_parts=$((inference_nj < lines ? inference_nj : lines))
    # shellcheck disable=SC2016  # $1, of the job
    record=$(
        echo '#!/usr/bin/env bash'
        echo "# Part \$1 of $num_parts; run in $PWD, after . ./path.sh"
        echo "# Its inputs, as cksum has them:"
        echo "#   ${sums//$'\n'/$'\n'#   }"
        echo 'set -euo pipefail'
        echo "command=($(printf ' %q' "$@") )"
        echo '"${command[@]//\{job\}/$1}"'
        echo "touch $(printf '%q' "$dir")/part\"\$1\"/done"
    )
    if [ "$(cat "$dir/part.sh" 2> /dev/null)" != "$record" ]; then
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
        _sbatch decode "${dir//%/%%}/part%a/log" "$dir/part${todo[0]}/log" \
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
    local job
    for ((job = 1; job <= num_parts; job++)); do
        cat "${1//\{job\}/$job}"
    done > "$2.partial"
    mv "$2.partial" "$2"
}

_parts_here() {  # _parts_here DIR PART ...
    local dir=$1 job pids=() devices failed=0
    shift
    # The parts share the GPUs, and the processors as set_max_jobs has it.
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
    echo "${cause:-$(tail -n 1 "$1")}" >&2
    return 1
}

# ------------------------------------------------------------------------------------ SLURM
# All jobs of this script have one name, under which they are cancelled when it ends before them.
_slurm_name=$(basename "$PWD").$(uname -n).$$
trap '[ "$cmd_backend" != slurm ] || scancel --quiet --name="$_slurm_name" --user="$(id -un)" || true' EXIT

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
        decode) gpus=$((ngpu > 0)) ;;
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
