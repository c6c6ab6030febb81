#!/usr/bin/env bash
# A Ray cluster under vLLM: Ray places the ranks on the nodes, so that one command on node 0 starts the model on all.
# GPUs only: vLLM's CPU build refuses it ("current platform cpu does not support ray").
#
# Prerequisites  as in multi_node.sh; port 6379 of node 0, and Ray's others, open between the nodes
# Start    on each node, in the repository's root, node 0 first:
#          NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash ch06_vllm/launch/ray_cluster.sh MODEL --tensor-parallel-size 16
#          NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash ch06_vllm/launch/ray_cluster.sh MODEL
# Check    `ray status` on node 0 lists NNODES nodes; curl http://10.0.0.1:8000/health
# Stop     Ctrl-C on node 0: Ray's head goes with it, and the other nodes end
set -euo pipefail

# shellcheck source=ch06_vllm/launch/node.sh
source "${BASH_SOURCE[0]%/*}/node.sh"
export RAY_USAGE_STATS_ENABLED=0
head="$MASTER_ADDR:${RAY_PORT:-6379}"

if [ "$NODE_RANK" != 0 ]; then
    for _ in $(seq 60); do  # the head may come up later
        if ray health-check --address "$head" >/dev/null 2>&1; then
            exec ray start --address "$head" --node-ip-address "$VLLM_HOST_IP" --disable-usage-stats --block
        fi
        sleep 2
    done
    echo "error: no Ray head at $head after 2 minutes; is node 0 up, and its port open?" >&2
    exit 2
fi

ray start --head --port "${RAY_PORT:-6379}" --node-ip-address "$VLLM_HOST_IP" --disable-usage-stats >&2
trap 'ray stop >/dev/null 2>&1' EXIT
joined() { python - "$head" <<'PYTHON'
import sys

import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
print(sum(node["Alive"] for node in ray.nodes()))
PYTHON
}
for _ in $(seq 60); do
    count=$(joined)
    if [ "$count" -ge "$NNODES" ]; then break; fi
    sleep 2
done
if [ "$count" -lt "$NNODES" ]; then
    echo "error: $count of $NNODES nodes have joined Ray after 2 minutes; see the others' output" >&2
    exit 2
fi
echo "ray: $count nodes" >&2
RAY_ADDRESS="$head" vllm serve "$@" --distributed-executor-backend ray
