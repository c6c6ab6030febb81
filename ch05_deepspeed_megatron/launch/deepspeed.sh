#!/usr/bin/env bash
# The deepspeed launcher on the hosts of a hostfile: by pdsh and ssh from one of them, or by hand on each.
#
# Prerequisites  the repository and its .venv at the same path on each host; port 29500 of the first open to the others;
#                by pdsh: pdsh here, and an ssh that asks for no password from here to all hosts, this one too
# Start    once, anywhere:
#          HOSTFILE=hostfile bash ch05_deepspeed_megatron/launch/deepspeed.sh \
#              ch05_deepspeed_megatron/train_deepspeed.py --preset 1b --out runs/job --resume auto
#          without ssh, on each host, NODE_RANK being its line in the hostfile, from 0:
#          NODE_RANK=0 HOSTFILE=hostfile bash ch05_deepspeed_megatron/launch/deepspeed.sh SCRIPT FLAGS
#          optional: MASTER_ADDR (default: the first host's name), MASTER_PORT (default: 29500), SSH_CONFIG (a file),
#          DS_ENV_FILE (NAME=VALUE lines for all ranks: pdsh passes on NCCL_* and PYTHON*, and little else)
# Check    "joined world_size=..." of rank 0; RESULT, which is not the last line: the launcher speaks after it
# Stop     Ctrl-C. Ranks are told to end by SIGTERM, on which train_deepspeed.py saves: it has 30 s
#
# The exit code is that of the rank that failed; but 0, as if all were well, if the launcher's own process on a host
# dies of a signal: where it matters, ask for the RESULT line.
set -euo pipefail

: "${HOSTFILE:?which hosts? name the hostfile}" "${1:?which script? name it behind deepspeed.sh}"
# shellcheck disable=SC1091
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

by_hand=${NODE_RANK:+--no-ssh}
checked=$(python ch05_deepspeed_megatron/check_launch.py --hostfile "$HOSTFILE" ${by_hand:+"$by_hand"} -- "$@")
first_host=$(python -c 'import json, sys; print(json.loads(sys.argv[1].rpartition("RESULT ")[2])["first_host"])' "$checked")

if [ -n "${NODE_RANK:-}" ]; then
    how=(--no_ssh --node_rank="$NODE_RANK")
else
    # Its own check asks for each host's name by ssh, in its way: pdsh says the same better. -N: no host before a line.
    how=(--no_ssh_check --launcher_args=-N --force_multi)
    if [ -n "${SSH_CONFIG:-}" ]; then export PDSH_SSH_ARGS_APPEND="-F $SSH_CONFIG"; fi
fi

exec deepspeed --no_local_rank \
    --hostfile "$HOSTFILE" \
    --master_addr "${MASTER_ADDR:-$first_host}" \
    --master_port "${MASTER_PORT:-29500}" \
    "${how[@]}" \
    "$@"
