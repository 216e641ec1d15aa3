# ESPnet trainings: resumed, kept, or refused. jobs.sh runs them.
# shellcheck shell=bash
# shellcheck disable=SC2154  # ngpu, num_nodes, cmd_backend, python: the recipe's

# train DIR INPUT ... -- COMMAND [ARG ...]: run the ESPnet training COMMAND, with --output_dir DIR and
# its output in DIR/train.log. DIR/run.sh records the command and the checksums of the INPUT files.
# A training of the same record is resumed, or kept if it has finished; one of another record in
# the same DIR is an error, unless only --max_epoch has grown or heads were added or left out. --ngpu
# is not part of the record.
train() {
    local dir=$1 inputs command sums record start=$SECONDS
    split_inputs "$@"
    record=$(
        echo '#!/usr/bin/env bash'
        echo "# What made this directory; run in $PWD, after . ./path.sh"
        echo "$sums"
        printf '%q ' "${command[@]}" --output_dir "$dir"
    )
    if [ -e "$dir/run.sh" ]; then
        same_training "$dir" "$record"
        if [ -e "$dir/finished" ]; then
            log "$dir: finished already, by this command from these inputs: kept"
            return
        fi
        log "$dir: resuming"
        if [ -e "$dir/train.log" ]; then
            mv "$dir/train.log" "$dir/train.before-$(date -u +%Y%m%d-%H%M%S).log"
        fi
    fi
    keep_record "$dir" "$record" "${inputs[@]}"
    local launch=() distributed=()
    if [ "$ngpu" -gt 1 ] || [ "$num_nodes" -gt 1 ]; then
        distributed+=(--multiprocessing_distributed true)
    fi
    if [ "$num_nodes" -gt 1 ]; then
        _launch_on_machines "$dir"
    fi
    run_job train "$dir/train.log" "${launch[@]}" "${command[@]}" --output_dir "$dir" --resume true \
        --ngpu "$ngpu" "${distributed[@]}"
    touch "$dir/finished"
    log "$dir: trained in $((SECONDS - start)) s"
}

# _launch_on_machines DIR: set train's launch and distributed for --num_nodes machines.
_launch_on_machines() {
    rm -f "$1"/.rendezvous*
    if [ "$cmd_backend" = slurm ]; then
        # One process on each machine; ESPnet makes one for each GPU of it. They meet in a file. A job
        # that SLURM starts again needs a new file.
        # shellcheck disable=SC2016  # of the job
        launch=(bash -c 'exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" \
            --dist_init_method "file://$0.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"' \
            "$(realpath -s "$1")/.rendezvous")
        distributed+=(--dist_launcher slurm)
    else
        # Without a cluster: one process on this machine stands for each machine.
        launch=("$python" -m torch.distributed.run --standalone --nproc-per-node "$num_nodes"
            --no-python)
    fi
    if [ "$ngpu" = 0 ]; then
        distributed+=(--dist_backend gloo)
    fi
}
