# How jobs run. Change it here, or with the options of the same names.
# shellcheck shell=bash disable=SC2034
cmd_backend=local                     # local: on this machine; slurm: submitted with sbatch
slurm_conf=../../../conf/slurm.conf   # sbatch's options for each kind of job
num_nodes=1                           # machines of one training
