"""vLLM over two hosts: tensor or pipeline parallel by its own multi-node launch, data parallel, and a Ray cluster.

You learn   what each node is told, who meets whom at which port, what crosses the wire for a token, and why tensor
            parallel wants the fast link inside a node and pipeline or data parallel takes the slow one between nodes
Laptop      python -m ch06_vllm.multi_node --form tensor        (two hosts of a virtual cluster, a core each)
            python -m ch06_vllm.multi_node --form data --rate 100mbit
GPU node    the same, if it has two GPUs: one a host
Cluster     on each node a script of ch06_vllm/launch, or sbatch ch06_vllm/launch/vllm.sbatch
You see     an answer, and the bytes that left host0 for each token of it. With --form ray on a CPU: the cluster of two
            nodes, and that vLLM refuses it there.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ch02_hardware_parallelism import virtual_cluster
from ch06_vllm import options
from ch06_vllm.serve_vllm import PROMPT, post, smoke
from ch06_vllm.servers import ENGINES, LAPTOP, LAPTOP_PIPELINE, Server, check_model, use_device
from common import process, script
from common.bootstrap import gpus_visible

PORT, LINE_PORT = 8000, 8001
REFUSED = "does not support ray"


@dataclass(frozen=True)
class Form:
    """A launch script that each host runs, the engine's options for it, and by how many the heads are divided."""

    engine: str
    launch: str
    options: Mapping[str, Any]
    tensor_parallel: int = 1


SMALL: dict[str, Any] = LAPTOP | {"kv-cache-memory-bytes": "256M", "max-model-len": 1024}
# Hosts that share a machine share /dev/shm, by which an engine takes their GPUs for neighbours.
ONE_MACHINE = {"disable-custom-all-reduce": True} if gpus_visible() else {}
TENSOR = {"tensor-parallel-size": 2} | ONE_MACHINE
FORMS = {
    "tensor": Form("vllm", "ch06_vllm/launch/multi_node.sh", SMALL | TENSOR, 2),
    "pipeline": Form("vllm", "ch06_vllm/launch/multi_node.sh", SMALL | {"pipeline-parallel-size": 2} | LAPTOP_PIPELINE),
    "data": Form("vllm", "ch06_vllm/launch/data_parallel.sh", SMALL),
    "ray": Form("vllm", "ch06_vllm/launch/ray_cluster.sh", SMALL | TENSOR, 2),
}


def head(name: str, form: Form, model: str, tokens: int, timeout_s: float) -> dict[str, Any]:
    """Host 0: start its share with the launch script, wait for the others through it, ask, stop."""
    nodes: list[int] = []

    def on_line(line: str) -> None:
        if match := re.fullmatch(r"ray: (\d+) nodes", line):
            nodes.append(int(match[1]))

    wanted = {**form.options, "host": "0.0.0.0"}
    sent_before = virtual_cluster.nic_bytes()[0]
    found: dict[str, Any] = {"form": name, "hosts": int(os.environ["NNODES"])}
    try:
        with Server(
            model, form.engine, wanted, port=PORT, timeout_s=timeout_s, launch=["bash", form.launch], on_line=on_line
        ) as server:
            loading = virtual_cluster.nic_bytes()[0]
            answer = smoke(server, tokens)
            sent = virtual_cluster.nic_bytes()[0] - loading
            found |= {"served": True, "start_s": server.start_s, **answer}
            found |= {"sent_bytes_to_start": loading - sent_before, "sent_bytes_per_token": sent / (2 * tokens)}
            found |= sent_by_decoding(server, tokens)
    except script.UserError as error:
        if name != "ray" or REFUSED not in str(error) or not nodes:
            raise
        print(error, file=sys.stderr, flush=True)
        found |= {"served": False, "refused": REFUSED}
    return found | ({"ray_nodes": nodes[0]} if nodes else {})


def sent_by_decoding(server: Server, tokens: int) -> dict[str, float]:
    """What leaves this host for one more token: a long answer's less a short one's, to a prompt that is known."""

    def counted() -> np.ndarray:  # bytes and packets, sent since eth0 came up
        (line,) = re.findall(r"eth0:(.*)", Path("/proc/self/net/dev").read_text())
        return np.array(line.split()[8:10], dtype=int)

    def sent(count: int) -> np.ndarray:
        before = counted()
        body = {"model": server.model, "prompt": PROMPT, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        post(f"{server.url}/v1/completions", body)
        return counted() - before

    short = sent(tokens)
    size, packets = (sent(5 * tokens) - short) / (4 * tokens)
    return {"sent_bytes_per_decoded_token": float(size), "sent_packets_per_decoded_token": float(packets)}


def follow(form: Form, model: str, timeout_s: float) -> dict[str, Any]:
    """Another host: its share, as long as host 0 is there."""
    words = [word for key, value in form.options.items() for word in (f"--{key}", str(value)) if word != "True"]
    with (
        process.Child(["bash", form.launch, model, *words], env=ENGINES[form.engine].environment(1)) as child,
        meet(timeout_s) as line,
    ):
        line.settimeout(0.2)
        while child.process.poll() is None:
            try:
                ended = not line.recv(1)
            except TimeoutError:
                ended = False
            except ConnectionError:
                ended = True
            if ended:
                return {}
        done = child.wait(0)
    raise script.UserError(f"this host's share ended early ({done.reason()}); see host 0's lines too")


def meet(timeout_s: float) -> socket.socket:
    """A connection to host 0, which ends when host 0 does, in whatever way."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((os.environ["MASTER_ADDR"], LINE_PORT), timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise script.UserError(f"host 0 is not there after {timeout_s:g} s ({error}); see its lines") from None
            time.sleep(0.2)


def main(argv: list[str] | None = None) -> dict:
    return over_hosts(argv, "ch06_vllm.multi_node", __doc__, FORMS)


def over_hosts(argv: list[str] | None, module: str, doc: str | None, forms: Mapping[str, Form]) -> dict:
    """What the script `module` does: the same on this machine, where it makes the cluster, and on each of its hosts."""
    parser = script.parser(doc)
    parser.add_argument("--form", choices=forms, default=next(iter(forms)))
    parser.add_argument("--model", default="made:nano", help="a folder that all hosts see, or made:PRESET")
    parser.add_argument("--rate", default="1gbit", help="of each host's link, in tc's units")
    parser.add_argument("--tokens", type=script.at_least(1), default=16, help="of each of two answers")
    parser.add_argument("--timeout-s", type=script.positive, default=600)
    args = parser.parse_args(argv)
    form = forms[args.form]
    use_device(args.device)
    ENGINES[form.engine].environment(1)  # raises where it is not installed
    if cluster := virtual_cluster.described():  # we are on one of its hosts
        place = {"NNODES": str(cluster.hosts), "NODE_RANK": os.environ["HOST_INDEX"]}
        os.environ.update(place | {"MASTER_ADDR": virtual_cluster.address(0)})
        if os.environ["HOST_INDEX"] == "0":
            with socket.create_server(("", LINE_PORT)):  # the others' connections wait in its backlog
                return head(args.form, form, args.model, args.tokens, args.timeout_s)
        return follow(form, args.model, args.timeout_s)
    model = options.make_models(args.model)
    check_model(model, form.tensor_parallel)
    launch = Path(form.launch).parent
    virtual_cluster.check_here(f"; on real nodes see {launch}")
    script.start(str(process.ROOT / f"{module.replace('.', '/')}.py"), args)
    words = ["--form", args.form, "--model", model, "--tokens", str(args.tokens), "--timeout-s", str(args.timeout_s)]
    command = [sys.executable, "-m", module, *words]
    done = virtual_cluster.run(command, launch="command", rate=args.rate, timeout_s=args.timeout_s + 60)
    if done.result is None:
        raise script.UserError(f"the two hosts did not serve ({done.reason(args.timeout_s)}); see {launch}")
    return done.result | {"folder": model, "rate": args.rate, "device": "cuda" if gpus_visible() else "cpu"}


if __name__ == "__main__":
    script.run(main)
