# What the launch scripts of this folder begin with: a node of several, SGLang's environment and variables on it.
# Each of them sources it with its own arguments.
: "${NNODES:?how many nodes are there? set it}" "${NODE_RANK:?which one is this, from 0? set it}"
: "${MASTER_ADDR:?address of node 0? set it}" "${1:?which model? name it first}"
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
variables=$(python -c 'import ch07_sglang_routing.sglang_engine; from ch06_vllm.servers import exports; exports("sglang")')
eval "$variables"
