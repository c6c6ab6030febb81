"""SGLang over two hosts: one model tensor parallel by SGLang's own multi-node launch.

You learn   what each node is told (how many, which, where node 0 is), that only node 0 answers requests, and what
            crosses the wire for a token
Laptop      python -m ch07_sglang_routing.multi_node              (two hosts of a virtual cluster, a core each)
            python -m ch07_sglang_routing.multi_node --rate 100mbit
GPU node    the same, if it has two GPUs: one a host
Cluster     on each node ch07_sglang_routing/launch/multi_node.sh, or sbatch ch07_sglang_routing/launch/sglang.sbatch
You see     an answer, and the bytes that left host0 for each token of it: two sums a layer of the hidden state
"""

from __future__ import annotations

from ch06_vllm.multi_node import Form, over_hosts
from ch07_sglang_routing import sglang_engine
from common import script
from common.bootstrap import gpus_visible

SMALL = {"tp-size": 2, "context-length": 1024} | ({} if gpus_visible() else sglang_engine.LAPTOP)
FORMS = {"tensor": Form("sglang", "ch07_sglang_routing/launch/multi_node.sh", SMALL, tensor_parallel=2)}


def main(argv: list[str] | None = None) -> dict:
    return over_hosts(argv, "ch07_sglang_routing.multi_node", __doc__, FORMS)


if __name__ == "__main__":
    script.run(main)
