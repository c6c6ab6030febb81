#!/usr/bin/env bash
# Data parallel over several nodes: a whole copy of the model on each (or several), one address for all of them on node
# 0, which gives each request to the copy that has the fewest.
#
# Prerequisites  as in multi_node.sh; two ports of node 0 (default 13345, and one that vLLM picks) open to the others
# Start    on each node, in any order, in the repository's root:
#          NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash ch06_vllm/launch/data_parallel.sh MODEL
#          NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash ch06_vllm/launch/data_parallel.sh MODEL
#          optional: COPIES (of each node, default 1); further options of `vllm serve`, as --tensor-parallel-size
# Check    curl http://10.0.0.1:8000/metrics | grep num_requests_running: a line for each engine
# Stop     Ctrl-C on node 0, then on the others
set -euo pipefail

# shellcheck source=ch06_vllm/launch/node.sh
source "${BASH_SOURCE[0]%/*}/node.sh"

copies=${COPIES:-1}
role=()
if [ "$NODE_RANK" != 0 ]; then role=(--headless --data-parallel-start-rank "$((NODE_RANK * copies))"); fi
exec vllm serve "$@" --data-parallel-size "$((NNODES * copies))" --data-parallel-size-local "$copies" \
    --data-parallel-address "$MASTER_ADDR" --data-parallel-rpc-port "${RPC_PORT:-13345}" "${role[@]}"
