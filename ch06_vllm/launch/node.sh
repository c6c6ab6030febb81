# What the launch scripts of chapters 6 and 7 begin with: a node of several, the engine's environment and variables on
# it. Each of them sources it with its own arguments. `engine`, and the `module` that makes it one: vLLM by default.
for asked in "NNODES how many nodes are there" "NODE_RANK which one is this, from 0" "MASTER_ADDR address of node 0"; do
    name=${asked%% *}
    if [ -z "${!name:-}" ]; then
        echo "error: $name is not set (${asked#* }?); set it in front of the command" >&2
        exit 2
    fi
done
if [ -z "${1:-}" ]; then
    echo "error: no model is named; its folder or id comes first" >&2
    exit 2
fi
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
variables=$(python -c 'import importlib, sys; from ch06_vllm.servers import exports
importlib.import_module(sys.argv[2]); exports(sys.argv[1])' "${engine:-vllm}" "${module:-ch06_vllm.servers}")
eval "$variables"
