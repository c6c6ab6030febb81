#!/usr/bin/env bash
# vLLM's own multi-node launch: one model over several nodes, tensor or pipeline parallel. Each node starts its share of
# the ranks; node 0 also answers requests.
#
# Prerequisites  the repository, its .venv and vLLM's environment (make setup-vllm) on each node, the model at the same
#                path or id; a port of node 0 (default 29501) open to the others
# Start    on each node, in any order, in the repository's root:
#          NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash ch06_vllm/launch/multi_node.sh MODEL --tensor-parallel-size 16
#          NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash ch06_vllm/launch/multi_node.sh MODEL --tensor-parallel-size 16
#          usual: --tensor-parallel-size for the GPUs of a node, --pipeline-parallel-size for the nodes
#          Slurm: sbatch ch06_vllm/launch/vllm.sbatch MODEL ...; laptop: python -m ch06_vllm.multi_node
# Check    curl http://10.0.0.1:8000/health
# Stop     Ctrl-C on node 0, then on the others
set -euo pipefail

# shellcheck source=ch06_vllm/launch/node.sh
source "${BASH_SOURCE[0]%/*}/node.sh"

role=()
if [ "$NODE_RANK" != 0 ]; then role=(--headless); fi
exec vllm serve "$@" --distributed-executor-backend mp --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29501}" "${role[@]}"
