#!/usr/bin/env bash
# A SLURM cluster on this machine, to try the recipes' slurm back end on (egs/TEMPLATE/scripts/jobs.sh).
set -euo pipefail

usage() {
    cat <<END
Usage: tools/slurm_single_node.sh install | start DIR | stop DIR
As root, on Debian or Ubuntu. install gets SLURM and munge where they are missing. start does so too,
runs a controller and two nodes on this machine with all they need in DIR, a new folder, and prints
the SLURM_CONF to export. stop ends them and removes DIR. A cluster that is there already is not
touched; no systemd, cgroups or database are needed. Logs: DIR/*.log.
END
}
die() { echo "slurm_single_node: error: $*" >&2; exit 1; }

action=${1:-}
case $action:$# in
    install:1) ;;
    start:2 | stop:2) dir=$(realpath -m "$2") ;;
    *) usage >&2; exit 2 ;;
esac

# A daemon's process id is in DIR/<name>.pid.
stop() {
    local pid file
    for file in "$dir"/*.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2> /dev/null || true
        timeout 20 tail --pid="$pid" -f /dev/null || kill -9 "$pid" 2> /dev/null || true
    done
    rm -rf "$dir"
}

install() {
    local missing=()
    command -v slurmctld > /dev/null || missing+=(slurmctld)
    command -v slurmd > /dev/null || missing+=(slurmd)
    command -v sbatch > /dev/null || missing+=(slurm-client)
    command -v munged > /dev/null || missing+=(munge)
    [ "${#missing[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        die "SLURM is missing; installing it takes root and apt-get"
    fi
    # The services aren't wanted: RUNLEVEL=1 keeps Debian from starting them.
    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
        --no-install-recommends "${missing[@]}"; } > /dev/null || die "apt-get can't install ${missing[*]}"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

start() {
    local host
    host=$(uname -n)
    [ "$(id -u)" = 0 ] || die "must be root"
    [[ $dir != *[[:space:]]* ]] || die "$dir: SLURM takes no spaces here"
    [ ! -e "$dir" ] || die "$dir: exists already"
    install
    mkdir -p "$dir/state"
    chmod 755 "$dir"
    head -c 1024 /dev/urandom > "$dir/munge.key"
    chmod 600 "$dir/munge.key"
    # --force: root's daemon, in a folder that others may write into.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    cat > "$dir/slurm.conf" <<END
ClusterName=posinv
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
SlurmctldPort=$(free_port)
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
SlurmdSpoolDir=$dir/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=posinv1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8
NodeName=posinv2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N posinv1
    slurmd -f "$SLURM_CONF" -N posinv2
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -t idle 2> /dev/null | wc -l)" = 2 ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    die "the nodes don't come up; logs in $dir"
}

"$action"
