# Functions that the recipes share: options, stages, jobs. Sourced, after `set -euo pipefail`.
# shellcheck shell=bash
# shellcheck disable=SC2154  # stage, stop_stage, skip_stages, ngpu, expdir: options of the caller
_template=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck source=cmd.sh
. "$_template/cmd.sh"

log() { echo "$(date '+%H:%M:%S') $*"; }
die() { echo "error: $*" >&2; exit 1; }

# ---------------------------------------------------------------------------------- options
# opt NAME DEFAULT HELP: declare --NAME; $NAME holds its value.
declare -A _opt_help=()
_opt_names=()
opt() {
    _opt_names+=("$1")
    _opt_help[$1]=$3
    printf -v "$1" '%s' "$2"
}

# The values printed are those given so far: a recipe's run.sh passes its choices first.
print_options() {
    local _name
    for _name in "${_opt_names[@]}"; do
        printf '  --%-22s %s (default: %s)\n' "$_name" "${_opt_help[$_name]}" "${!_name:-none}"
    done
    printf '  --%-22s %s\n' config "YAML file of options, name: value" help "print this and exit"
}

_set_option() {  # _set_option NAME VALUE WHERE
    [ -n "${_opt_help[$1]+set}" ] || die "$3: unknown option --$1; --help lists the options"
    printf -v "$1" '%s' "$2"
}

# parse_options "$@": the options declared by opt; later ones win. Values from --config FILE.yaml
# count at the place where it stands.
parse_options() {
    local _name _pairs _key _value  # an option may be called "name"
    while [ $# -gt 0 ]; do
        case $1 in
            --help)
                echo "Usage: $0 [options]"
                print_options
                exit 0
                ;;
            --*) _name=${1#--} ;;
            *) die "unexpected argument: $1; options look like --name value" ;;
        esac
        [ $# -ge 2 ] || die "option --$_name needs a value"
        if [ "$_name" = config ]; then
            _pairs=$(mktemp)
            (. ./path.sh >&2 && python3 -m posinv.bin.recipe_options "$2") > "$_pairs" || { rm -f "$_pairs"; exit 1; }
            while IFS= read -r -d '' _key && IFS= read -r -d '' _value; do
                _set_option "$_key" "$_value" "$2"
            done < "$_pairs"
            rm -f "$_pairs"
        else
            _set_option "$_name" "$2" "$0"
        fi
        shift 2
    done
}

# ----------------------------------------------------------------------------------- stages
# run_stage NUMBER TITLE FUNCTION: run FUNCTION if --stage, --stop_stage and --skip_stages say
# so; one line before and one, with the time it took, after. What FUNCTION prints is shown.
# Its names begin with _, so that they hide no option from FUNCTION.
run_stage() {
    local _number=$1 _title=$2 _function=$3 _start=$SECONDS
    if [ "$_number" -lt "$stage" ] || [ "$_number" -gt "$stop_stage" ]; then
        return
    fi
    if [[ " $skip_stages " == *" $_number "* ]]; then
        log "stage $_number: $_title: skipped (--skip_stages)"
        return
    fi
    log "stage $_number: $_title"
    _stage_title="stage $_number ($_title)"
    "$_function"
    log "stage $_number: done in $((SECONDS - _start)) s"
}

# ------------------------------------------------------------------------------------- jobs
# queue COMMAND [ARG ...]: run COMMAND, a function or program that logs on its own, in the
# background, at most $max_jobs (see set_max_jobs) at once. wait_jobs waits for all of them and
# fails if one failed.
_jobs_queued=0
_jobs_done=
set_max_jobs() {
    max_jobs=$1
    # The jobs share the processors. A thread that waits must not keep one busy meanwhile: on a
    # shared machine that has made an LSTM 70 times slower.
    OMP_NUM_THREADS=$(($(nproc) / max_jobs > 0 ? $(nproc) / max_jobs : 1))
    export OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE
}
set_max_jobs 1

queue() {
    while [ "$(jobs -rp | wc -l)" -ge "$max_jobs" ]; do
        _show_progress
    done
    # A line in a file for each job that ends well, since bash forgets the exit status of a job
    # whose process id comes round again.
    _jobs_done=${_jobs_done:-$(mktemp)}
    (
        "$@"
        echo ok >> "$_jobs_done"
    ) &
    _jobs_queued=$((_jobs_queued + 1))
}

# Background jobs ignore Ctrl-C: end them with the script.
_kill_tree() {
    local child
    for child in $(pgrep -P "$1" || true); do
        _kill_tree "$child"
    done
    kill "$1" 2> /dev/null || true
}
trap 'for pid in $(jobs -p); do _kill_tree "$pid"; done; wait; exit 130' INT TERM

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

wait_jobs() {
    local failed
    [ "$_jobs_queued" -gt 0 ] || return 0
    while [ -n "$(jobs -rp)" ]; do
        _show_progress
    done
    wait
    failed=$((_jobs_queued - $(wc -l < "$_jobs_done")))
    rm -f "$_jobs_done"
    _jobs_queued=0
    _jobs_done=
    set_max_jobs 1
    if [ "$failed" -gt 0 ]; then
        die "${_stage_title:-jobs}: $failed of the jobs failed"
    fi
}

# ------------------------------------------------------------------------------------ files
# require FILE WHAT: fail with one line unless FILE is there.
require() {
    [ -e "$1" ] || die "$1: not found: $2"
}

# files_of SSL_MODEL: fill the array ssl_files with what a training depends on; a hub name has none.
# shellcheck disable=SC2034  # the caller's
files_of() {
    ssl_files=()
    if [ -d "$1" ]; then
        ssl_files=("$1/config.json" "$1/model.safetensors")
    fi
}

# train DIR INPUT ... -- COMMAND [ARG ...]: an ESPnet training in DIR (COMMAND gets --output_dir),
# with DIR/train.log. DIR/run.sh keeps the command and the checksums of the INPUT files. The same
# training again is resumed where it stopped, or kept if it was finished; another command, or
# other inputs, in the same DIR is an error. --ngpu may differ.
train() {
    local dir=$1 inputs=() sums record
    shift
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    mkdir -p "$dir"
    sums=$(cksum -- "${inputs[@]}") || die "${_stage_title:-training}: $dir: an input can't be read"
    record=$(
        echo '#!/usr/bin/env bash'
        echo "# What made this directory; run in $PWD, after . ./path.sh"
        echo "# Its inputs, as cksum has them:"
        echo "#   ${sums//$'\n'/$'\n'#   }"
        printf '%q ' "$@" --output_dir "$dir"
    )
    if [ -e "$dir/run.sh" ]; then
        if [ "$(cat "$dir/run.sh")" != "$record" ]; then
            diff "$dir/run.sh" <(echo "$record") >&2 || true
            die "$dir was made by another command or from other inputs (above); remove it, or choose another --expdir"
        fi
        if [ -e "$dir/finished" ]; then
            log "$dir: finished already, by this command from these inputs: kept"
            return
        fi
        log "$dir: resuming"
        if [ -e "$dir/train.log" ]; then
            mv "$dir/train.log" "$dir/train.before-$(date -u +%Y%m%d-%H%M%S).log"
        fi
    else
        echo "$record" > "$dir/run.sh"
        chmod +x "$dir/run.sh"
    fi
    local launch=() distributed=()
    if [ "$ngpu" -gt 1 ] || [ "$num_nodes" -gt 1 ]; then
        distributed+=(--multiprocessing_distributed true)
    fi
    if [ "$num_nodes" -gt 1 ]; then
        rm -f "$dir"/.rendezvous*
        if [ "$cmd_backend" = slurm ]; then
            # A process for each machine, which ESPnet makes one for each GPU. They meet in a file;
            # a job that SLURM starts again needs a new one.
            # shellcheck disable=SC2016  # of the job
            launch=(bash -c 'exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" \
                --dist_init_method "file://$0.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"' \
                "$(realpath -s "$dir")/.rendezvous")
            distributed+=(--dist_launcher slurm)
        else
            # Machines rehearsed: a process on this one for each.
            launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$num_nodes"
                --no-python)
        fi
        if [ "$ngpu" = 0 ]; then
            distributed+=(--dist_backend gloo)
        fi
    fi
    run_job train "$dir/train.log" "${launch[@]}" "$@" --output_dir "$dir" --resume true \
        --ngpu "$ngpu" "${distributed[@]}"
    touch "$dir/finished"
}
