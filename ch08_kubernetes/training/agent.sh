#!/usr/bin/env bash
# One pod's torchrun: meets the other pods, and turns a pod's end into a checkpoint.
#
# Prerequisites  the image of images/Dockerfile; in the environment NNODES, RDZV_ENDPOINT, RDZV_ID and POD_IP
#                (optional: NPROC_PER_NODE, MAX_RESTARTS)
# Start    as the container's command: bash ch08_kubernetes/training/agent.sh SCRIPT FLAGS
# Check    kubectl logs: "joined world_size=..." of rank 0
# Stop     kubectl delete pod: SIGTERM, a checkpoint at the end of the step, exit code 143
#
# Kubernetes signals this shell alone, which tells the ranks. torchrun must not hear of it: on SIGTERM it would give the
# ranks 30 s, however long a checkpoint takes. In this pod the ranks then end with 0, and torchrun does not start them
# again; in the others they end with 1 (rank.py), and torchrun does, and waits for the pod that replaces this one. Exit
# code 143: a pod that was told to leave must not end with 0, or an Indexed Job would count its index as done.
set -euo pipefail

: "${NNODES:?how many pods are there? set it}" "${RDZV_ENDPOINT:?where do they meet, HOST:PORT? set it}"
: "${1:?which script? name it behind agent.sh}"

TOLD_TO_LEAVE=$(mktemp --dry-run)
export TOLD_TO_LEAVE # is there once this pod was told to

agent=
leave() {
    : >"$TOLD_TO_LEAVE"
    [ -n "$agent" ] || exit 143 # nothing has begun
    ranks=$(pgrep --parent "$agent" || true)
    for rank in $ranks; do kill -TERM "$rank" 2>/dev/null || true; done
    for rank in $ranks; do tail --pid="$rank" -f /dev/null; done # the kubelet's grace period is the time-out
    kill -KILL "$agent" 2>/dev/null || true
    exit 143
}
trap leave TERM

# Pod 0 keeps the rendezvous. torchrun would find that out by name, and a pod's DNS entry may come after the pod.
keeps=$([ "${JOB_COMPLETION_INDEX:-0}" = 0 ] && echo true || echo false)
# With a store that the agents share, torchrun tells its address in the first round alone: a pod that comes later waits.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=1
(
    trap '' TERM
    # env: an ignored signal is ignored by children too, and the ranks shall hear it.
    exec torchrun \
        --nnodes="$NNODES" \
        --nproc-per-node="${NPROC_PER_NODE:-$gpus}" \
        --rdzv-backend=c10d \
        --rdzv-endpoint="$RDZV_ENDPOINT" \
        --rdzv-id="${RDZV_ID:-book}" \
        ${JOB_COMPLETION_INDEX:+--rdzv-conf=is_host=$keeps} \
        --local-addr="${POD_IP:-127.0.0.1}" \
        --max-restarts="${MAX_RESTARTS:-0}" \
        --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        --no-python env --default-signal=TERM python -u -m ch08_kubernetes.training.rank "$@"
) &
agent=$!

wait "$agent"
