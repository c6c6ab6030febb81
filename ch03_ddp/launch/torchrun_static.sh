#!/usr/bin/env bash
# torchrun with a static rendezvous: you say which node is which, and the ranks are where you put them.
#
# Prerequisites  the repository and its .venv at the same path on each node; MASTER_PORT of node 0 open to the others
# Start    on each node, in any order, in the repository's root:
#          NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash ch03_ddp/launch/torchrun_static.sh ch03_ddp/train_ddp.py --preset nano
#          NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 bash ch03_ddp/launch/torchrun_static.sh ch03_ddp/train_ddp.py --preset nano
#          optional: NPROC_PER_NODE (default: the GPUs of this node, else 1), MASTER_PORT (default: 29500)
# Check    the same with ch03_ddp/preflight.py for the script; "joined world_size=..." in node 0's output
# Stop     Ctrl-C on one node: the ranks of the others then lose a peer, and their torchrun ends
#
# The node with NODE_RANK 0 is the one at MASTER_ADDR. Nothing is restarted: for that take torchrun_c10d.sh.
set -euo pipefail

: "${NNODES:?how many nodes are there? set it}" "${NODE_RANK:?which one is this, from 0? set it}"
: "${MASTER_ADDR:?name or address of node 0? set it}" "${1:?which script? name it behind torchrun_static.sh}"
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=1

exec torchrun \
    --nnodes="$NNODES" \
    --node-rank="$NODE_RANK" \
    --master-addr="$MASTER_ADDR" \
    --master-port="${MASTER_PORT:-29500}" \
    --nproc-per-node="${NPROC_PER_NODE:-$gpus}" \
    "$@"
