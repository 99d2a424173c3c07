#!/bin/bash
# Train on several nodes under SLURM. What the time limit ends is saved, and the job queues itself again to go on.
#
#     sbatch examples/slurm_train.sh /shared/runs/own own --data mixture.yaml --optim.steps 100000
#
# The first argument is the run's directory, which all nodes must see; the others are those of `transfusion train`.
# What SLURM is asked for below, and the way to the Python environment, are a cluster's own.
#
# 1. Five minutes before the limit SLURM sends SIGUSR1 to the task of each node, the shell in `train_on_node`; where
#    another job takes the nodes, or `scancel` ends this one, it sends SIGTERM.
# 2. That shell passes it on to the training processes as SIGUSR1. (torchrun, which would end at them, ignores both.)
# 3. They stop at the same step, save and end with status 0. Where steps are left, the job requeues itself, unless SLURM
#    is ending it already: it requeues by itself what made room for others, and not what was cancelled.
#    A command that could not do its work ends with another status; the job then ends, too, without a requeue.
#
#SBATCH --job-name=transfusion
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

train_on_node() { # HOST ARGUMENTS...: start the processes of this node; they meet those of the others at HOST
    local host=$1 status=0 agent
    (
        trap '' USR1 TERM
        exec torchrun --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
            --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
            --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$host:29400" \
            -m transfusion.train "${@:2}"
    ) &
    agent=$!
    trap 'pkill -USR1 --parent "$agent"' USR1 TERM
    wait "$agent" || status=$?
    while kill -0 "$agent" 2>/dev/null; do # the signal ended `wait`, not torchrun
        status=0
        wait "$agent" || status=$?
    done
    return "$status"
}
export -f train_on_node

saved_run_has() { # CONDITION: what is saved of the run, a dictionary, or None
    python -c "import sys; from transfusion.command import saved_run; from pathlib import Path
run = saved_run(Path(sys.argv[1])); sys.exit(not ($1))" "$out"
}

out=$1
arguments=("${@:2}" --out "$out" --auto-resume)
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")

srun --kill-on-bad-exit=1 bash -c 'train_on_node "$@"' train_on_node "${hosts%%$'\n'*}" "${arguments[@]}"

state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) || state=RUNNING # a busy controller says nothing
if [[ $state == RUNNING ]] && saved_run_has 'run and run["step"] < run["config"]["optim"]["steps"]'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
