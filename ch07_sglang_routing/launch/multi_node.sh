#!/usr/bin/env bash
# SGLang's own multi-node launch: one model over several nodes. Each node starts its share of the ranks; node 0 also
# answers requests.
#
# Prerequisites  the repository, its .venv and SGLang's environment (make setup-sglang) on each node, the model at the
#                same path or id; a port of node 0 (default 20000, and some above it) open to the others
# Start    on each node, in any order, in the repository's root:
#          NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash ch07_sglang_routing/launch/multi_node.sh MODEL --tp-size 16
#          NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash ch07_sglang_routing/launch/multi_node.sh MODEL --tp-size 16
#          optional: INTERFACE (the network device between the nodes, for NCCL and gloo)
#          Slurm: sbatch ch07_sglang_routing/launch/sglang.sbatch MODEL ...; laptop: python -m ch07_sglang_routing.multi_node
# Check    curl http://10.0.0.1:30000/health
# Stop     Ctrl-C on node 0, then on the others
set -euo pipefail

engine=sglang module=ch07_sglang_routing.sglang_engine
# shellcheck source=ch06_vllm/launch/node.sh
source "${BASH_SOURCE[0]%/*}/../../ch06_vllm/launch/node.sh"

if [ -n "${INTERFACE:-}" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
exec python -m sglang.launch_server --model-path "$1" --host 0.0.0.0 "${@:2}" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --dist-init-addr "$MASTER_ADDR:${MASTER_PORT:-20000}"
