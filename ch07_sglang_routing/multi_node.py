"""SGLang over two hosts: one model tensor parallel by SGLang's own multi-node launch.

You learn   what each node is told (how many, which, where node 0 is), that only node 0 answers requests, and what
            crosses the wire for a token
Laptop      python -m ch07_sglang_routing.multi_node              (two hosts of a virtual cluster, a core each)
            python -m ch07_sglang_routing.multi_node --rate 100mbit
GPU node    the same, if it has two GPUs: one a host
Cluster     on each node ch07_sglang_routing/launch/multi_node.sh, or sbatch ch07_sglang_routing/launch/sglang.sbatch
You see     an answer, and the bytes that left host0 for one more token of it, beside what of them is the model's: two
            sums a layer and one of the embedding, each of a hidden state, half of the logits, and the packets' headers.
            The rest is what the two schedulers tell each other
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ch02_hardware_parallelism.virtual_hosts import described
from ch06_vllm.multi_node import ONE_MACHINE, Form, over_hosts
from ch07_sglang_routing import sglang_engine
from common import script
from common.bootstrap import gpus_visible

HOSTS = 2
HEADER = 66  # bytes of a packet, full or empty: Ethernet 14, IPv4 20, TCP with timestamps 32
SMALL = {"tp-size": HOSTS, "context-length": 1024} | (ONE_MACHINE if gpus_visible() else sglang_engine.LAPTOP)
FORMS = {"tensor": Form("sglang", "ch07_sglang_routing/launch/multi_node.sh", SMALL, tensor_parallel=HOSTS)}


def formula(config: dict[str, Any]) -> dict[str, int]:
    """Bytes that one of two ranks sends for a token in bf16. A ring's sum sends 2 (N-1)/N = 1 times what is summed; of
    the logits each has a half, and sends it once."""
    state, vocab = 2 * config["hidden_size"], 2 * config["vocab_size"]
    return {"sums": (2 * config["num_hidden_layers"] + 1) * state, "logits": vocab // HOSTS}


def main(argv: list[str] | None = None) -> dict:
    found = over_hosts(argv, "ch07_sglang_routing.multi_node", __doc__, FORMS)
    if described() is not None:  # on one of the hosts
        return found
    config = json.loads(Path(found["folder"], "config.json").read_text(encoding="utf-8"))
    terms, sent = formula(config), found["sent_bytes_per_decoded_token"]
    terms["headers"] = round(HEADER * found["sent_packets_per_decoded_token"])
    rest = sent - sum(terms.values())
    told = ", ".join(f"{name} {size}" for name, size in terms.items())
    print(f"a token: {sent:.0f} bytes left host 0: {told}, the rest {rest:.0f}")
    return found | {f"{name}_bytes_per_token": size for name, size in terms.items()} | {"rest_bytes_per_token": rest}


if __name__ == "__main__":
    script.run(main)
