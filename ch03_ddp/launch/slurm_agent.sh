#!/usr/bin/env bash
# One node's torchrun under srun.
#
# Prerequisites  started by srun in train.sbatch, one task a node, with RDZV_ENDPOINT=HOST:PORT the same on all
# Start    srun bash ch03_ddp/launch/slurm_agent.sh SCRIPT FLAGS
# Check    its lines in the job's output
# Stop     scancel
#
# Slurm signals the task (proctrack/cgroup) or all its descendants (proctrack/linuxproc). The task is this shell, which
# tells the ranks. torchrun must not hear of it: SIGUSR1 would kill it, and on SIGTERM it gives the ranks 30 s, however
# long a checkpoint takes, and then fails the job.
set -euo pipefail

# shellcheck disable=SC2317
tell_the_ranks() { pkill --signal "$1" --parent "$agent" || true; }
trap 'tell_the_ranks USR1' USR1
trap 'tell_the_ranks TERM' TERM

(
    trap '' USR1 TERM
    # env: an ignored signal is ignored by children too. A rank that does not handle TERM shall end of it.
    exec torchrun \
        --nnodes="$SLURM_STEP_NUM_NODES" \
        --nproc-per-node="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
        --rdzv-backend=c10d \
        --rdzv-endpoint="$RDZV_ENDPOINT" \
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --local-addr="$SLURMD_NODENAME" \
        --max-restarts="${MAX_RESTARTS:-0}" \
        --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        --no-python env --default-signal=TERM python -u "$@"
) &
agent=$!

code=0
wait "$agent" || code=$?
while kill -0 "$agent" 2>/dev/null; do # a signal ends `wait`, not torchrun
    wait "$agent" || code=$?
done
wait "$agent" && code=0 || code=$?
exit "$code"
