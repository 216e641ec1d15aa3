# guard.sh SIGNATURE FOLDER ...: stands beside a run, in a session of its own. It renews the run's locks in
# these folders; where the run is killed, it ends what the run has started. processes.sh tells of locks.
# shellcheck shell=bash
. scripts/options.sh
. scripts/processes.sh
_signature=$1
shift
IFS=/ read -r host pid start place _ jobs <<< "$_signature"
while [ "$(start_of "$pid")" = "$start" ]; do
    for folder in "$@"; do
        for file in "$folder"/.lock*; do
            ! _is_ours "$file" || touch -hc "$file"
        done
    done
    sleep 5
done
end_processes "$host/$pid/$start/$place"
cancel_jobs "$jobs"
