#!/usr/bin/env bash
# torchrun with a c10d rendezvous: the same line on each node. Nodes may come late, leave, and be replaced.
#
# Prerequisites  the repository and its .venv at the same path on each node; RDZV_ENDPOINT's port open to the others
# Start    on each node, in any order, in the repository's root:
#          NNODES=2 RDZV_ENDPOINT=host0:29400 bash ch03_ddp/launch/torchrun_c10d.sh ch03_ddp/train_ddp.py --preset nano
#          optional: NPROC_PER_NODE (default: the GPUs of this node, else 1), RDZV_ID (default: book; another for each job
#          at the same endpoint), MAX_RESTARTS (default: 0)
#          elastic: NNODES=1:4 MAX_RESTARTS=3 trains with what is there, and starts again when a node comes or goes
# Check    the same with ch03_ddp/preflight.py for the script; "joined world_size=..." in the output of rank 0's node
# Stop     Ctrl-C on one node: the ranks of the others then lose a peer, and their torchrun ends
#
# The node whose name or address is in RDZV_ENDPOINT serves the rendezvous. Ranks follow the nodes' names as text, so
# that rank 0 need not be there: host10 comes before host2.
set -euo pipefail

: "${NNODES:?how many nodes are there? set it}" "${RDZV_ENDPOINT:?where do they meet, HOST:PORT? set it}"
: "${1:?which script? name it behind torchrun_c10d.sh}"
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=1

exec torchrun \
    --nnodes="$NNODES" \
    --nproc-per-node="${NPROC_PER_NODE:-$gpus}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$RDZV_ENDPOINT" \
    --rdzv-id="${RDZV_ID:-book}" \
    --max-restarts="${MAX_RESTARTS:-0}" \
    "$@"
