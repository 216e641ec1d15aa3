# A run: its mark, its locks on folders, its end. guard.sh stands beside it.
# shellcheck shell=bash

FRESH=300  # seconds after which the lock of another host counts as left by a dead run

# start_of PID: print the start time of a process in ticks since boot; nothing if it has ended.
start_of() {
    local stat words
    { stat=$(< "/proc/$1/stat"); } 2> /dev/null || return 0
    read -ra words <<< "${stat##*) }"
    [[ ${words[0]} == [ZX] ]] || echo "${words[19]}"
}

# Print an id of this boot and this PID namespace (container): process ids can be compared only within
# one of these.
_place() {
    local boot
    boot=$(cat /proc/sys/kernel/random/boot_id 2> /dev/null || true)
    echo "$boot.$(stat -Lc %i /proc/self/ns/pid)"
}

# begin_run "$@": mark this script and all that it starts by the variable POSINV_RUN, for which it starts
# anew; whatever ends it then ends all of them. To be called first, with the script's arguments.
begin_run() {
    local run
    run=$(uname -n)/$$/$(start_of $$)/$(_place)
    if [ "${POSINV_RUN:-}" != "$run" ]; then
        POSINV_RUN=$run exec "$BASH" "$0" "$@"
    fi
    _slurm_name=  # of its SLURM jobs
    _signature=$run/$(date -u '+%Y-%m-%d %H:%M')/
    trap _end_run EXIT
    # Bash can run a trap while it parses a $(...). It then takes the trap's command for a part of the
    # $(...), and fails if there is no closing ")". So the command has a second line, ")". At other times
    # bash doesn't reach that line, because _stop exits.
    local signal end=$'\n)'
    for signal in HUP INT TERM; do
        # shellcheck disable=SC2064  # expanded now
        trap "_stop $signal$end" "$signal"
    done
}

# name_slurm_jobs NAME: NAME is that of this run's jobs.
name_slurm_jobs() {
    _slurm_name=$1
    _signature+=$1
}

_stop() {  # _stop SIGNAL
    trap '' HUP INT TERM
    echo "error: ended by SIG$1; the same command goes on from here" >&2
    exit $((128 + $(kill -l "$1")))
}

_end_run() {
    rm -f "${_jobs_done:-}"
    end_processes "$POSINV_RUN"
    rm -rf "${_fork_server:-}"
    cancel_jobs "$_slurm_name" || true
    unlock "${_locked[@]}"
}

# end_processes RUN: end what RUN started, but for this script: by SIGTERM, after 10 s by SIGKILL.
end_processes() {
    local found pid alive deadline=$((SECONDS + 10)) signal=TERM
    local -A told=()
    while :; do
        found=$(env -u POSINV_RUN grep -slzFx "POSINV_RUN=$1" /proc/[0-9]*/environ || true)
        alive=0
        [ "$SECONDS" -le "$deadline" ] || signal=KILL
        for pid in $found; do
            pid=${pid#/proc/}
            pid=${pid%/environ}
            # Those that searched have ended meanwhile.
            if [ "$pid" = $$ ] || [ -z "$(start_of "$pid")" ]; then
                continue
            fi
            alive=1
            # A process that cleans up must not be told twice.
            [ "${told[$pid]:-}" = "$signal" ] || kill -s "$signal" "$pid" 2> /dev/null || true
            told[$pid]=$signal
        done
        [ "$alive" = 1 ] || return 0
        sleep 0.1
    done
}

# cancel_jobs NAME: cancel a run's SLURM jobs, and wait until they have ended; fail if they don't.
# NAME may be empty: none.
cancel_jobs() {
    local seconds
    [ -n "$1" ] || return 0
    command -v scancel > /dev/null || return 1
    scancel --quiet --name="$1" --user="$(id -un)" || true
    for ((seconds = 0; seconds < 60; seconds++)); do
        [ -n "$(squeue --noheader --name="$1" 2> /dev/null)" ] || return 0
        sleep 1
    done
    return 1
}

# ------------------------------------------------------------------------------------ locks
# FOLDER/.lock is a dangling symbolic link, whose target names the holder. Making a link is atomic, on
# network file systems, too. .lock.reader.<host>.<pid> are the runs that read.
_locked=()

# start_guard FOLDER ...: start guard.sh for this run, whose locks are in these folders.
start_guard() {
    env -u POSINV_RUN setsid --fork "$BASH" scripts/guard.sh "$_signature" "$@" < /dev/null > /dev/null 2>&1
}

# lock FOLDER ADVICE: keep FOLDER for this run, until it ends, or calls unlock or share. If another run has
# it or reads there, end with one line that names that run and gives ADVICE.
lock() {
    local folder=$1 advice=$2 other="make it writable, or choose another" file=$1/.lock error tries=0 reader
    local holder  # read once: what is judged to be dead must be what is taken over
    error=$(mkdir -p "$folder" 2>&1) || die "$folder: can't be made: ${error##*: }: $other"
    until error=$(ln -sT "$_signature" "$file" 2>&1) || _is_ours "$file"; do
        if holder=$(readlink "$file"); then
            _refuse_if_held "$file" "$holder" "$advice"
            _take_over "$file" "$holder" && break
        fi
        [ $((tries += 1)) -lt 10 ] || die "$folder: can't be locked: ${error##*: }: $other"
        sleep 0.2
    done
    _locked+=("$file")
    for reader in "$folder"/.lock.reader.*; do
        if holder=$(readlink "$reader") && ! _is_ours "$reader"; then
            _refuse_if_held "$reader" "$holder" "$advice"
            rm -f "$reader"
        fi
    done
}

# share FOLDER ADVICE: let other runs read FOLDER, too, but not change it. End as lock does if another run
# is changing it.
share() {
    local folder=$1 advice=$2 mark holder
    mark=$1/.lock.reader.$(uname -n).$$
    [ -d "$folder" ] || return 0
    if [ -w "$folder" ]; then
        ln -sfT "$_signature" "$mark"
        _locked+=("$mark")
    fi
    unlock "$folder/.lock"
    ! holder=$(readlink "$folder/.lock") || _refuse_if_held "$folder/.lock" "$holder" "$advice"
}

# unlock FILE ...: remove locks, if they are this run's.
unlock() {
    local file
    for file in "$@"; do
        ! _is_ours "$file" || rm -f "$file"
    done
}

_is_ours() { [ "$(readlink "$1" 2> /dev/null)" = "$_signature" ]; }

# _refuse_if_held LOCK HOLDER ADVICE: end with an error if HOLDER, whom LOCK names, still runs.
_refuse_if_held() {
    local host pid since seen _
    if _is_held "$1" "$2"; then
        IFS=/ read -r host pid _ _ since _ <<< "$2"
        die "${1%/.lock*}: in use by another run: process $pid on $host, since $since UTC$seen: $3"
    fi
}

# _is_held LOCK HOLDER: whether HOLDER, whom LOCK names, still runs. On this host its process says so. Of
# another host, or a container, only the lock's time is seen, which guard.sh renews; $seen tells of it.
_is_held() {
    local folder=${1%/.lock*} pid start place age _
    seen=
    IFS=/ read -r _ pid start place _ <<< "$2"
    if [ "$place" = "$(_place)" ]; then
        [ "$(start_of "$pid")" = "$start" ]
    else
        age=$(($(_now "$folder") - $(stat -c %Y "$1" 2> /dev/null || echo 0)))
        seen=" (last seen $age s ago; after $FRESH s it counts as dead)"
        [ "$age" -lt "$FRESH" ]
    fi
}

# _now FOLDER: the time by the clock of FOLDER's file system, in seconds.
_now() {
    local file=$1/.lock.now.$$
    if touch "$file" 2> /dev/null; then
        stat -c %Y "$file"
        rm -f "$file"
    else
        date +%s
    fi
}

# _take_over LOCK DEAD: end what is left of the dead run DEAD, whom LOCK names, and make LOCK ours; fail if
# another run does so.
_take_over() {
    local file=$1 dead=$2 last=$2 claim host pid start place since jobs seen
    IFS=/ read -r host pid start place since jobs <<< "$dead"
    end_processes "$host/$pid/$start/$place"
    cancel_jobs "$jobs" || die "${file%/.lock}: the SLURM jobs $jobs of a dead run may still be there: cancel them, and remove $file"
    # Only the run that has the claim to a dead run's place takes it. A dead run may have had a claim.
    while claim=$file.after.${last//[\/ ]/_} && ! ln -sT "$_signature" "$claim" 2> /dev/null; do
        last=$(readlink "$claim") || return 1
        ! _is_held "$claim" "$last" || return 1  # it takes over in a moment
    done
    if [ "$(readlink "$file")" != "$dead" ]; then
        rm -f "$claim"
        return 1
    fi
    ln -sfT "$_signature" "$file.$$"
    mv -fT "$file.$$" "$file"
    rm -f "$file".after.*
    log "${file%/.lock}: process $pid on $host, which has ended, left a lock: taken over"
}
