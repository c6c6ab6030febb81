"""Prefill and decode on different GPUs with SGLang: one server reads the prompt, another one writes the answer.

You learn   what the two are told of each other (where the prefill side can be asked, the number of a room for the
            request), that both get the request, and that the KV cache goes between them and not through the client
Laptop      no: SGLang 0.5.23 starts both sides on a CPU and they find each other over TCP, but what it sends lies in
            pinned memory, which needs a GPU's driver. Chapter 6's engine can hand blocks over on a CPU
GPU node    python -m ch07_sglang_routing.prefill_decode --model made:1b
Cluster     each file of configs/prefill.yaml and decode.yaml on a node of its own, and a router in front of them
You see     the answer of the decode side
"""

from __future__ import annotations

import secrets
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ch06_vllm import options
from ch06_vllm.serve_vllm import PROMPT, post
from ch06_vllm.servers import Server, use_device
from ch07_sglang_routing import sglang_engine  # noqa: F401  it is an engine from here on
from common import script
from common.bootstrap import gpus_visible

CONFIGS = Path("ch07_sglang_routing/configs")
CONTEXT = 4096  # what made:PRESET has; the files' is for larger models


def ask(pool: Executor, prefill: str, decode: str, bootstrap_port: int, tokens: int) -> dict[str, Any]:
    """What a router does: the same request to both addresses, with where the prefill side is and a room of its own.

    Raises:
        UserError: of the side that refused it first; the other one may wait for that one's blocks until its end.
    """
    body: dict[str, Any] = {"text": PROMPT, "sampling_params": {"max_new_tokens": tokens, "temperature": 0}}
    body["sampling_params"]["ignore_eos"] = True
    body |= {"bootstrap_host": urlsplit(prefill).hostname, "bootstrap_port": bootstrap_port}
    body["bootstrap_room"] = secrets.randbits(63)
    reading, writing = (pool.submit(post, f"{url}/generate", body) for url in (prefill, decode))
    first, _ = wait([reading, writing], return_when=FIRST_COMPLETED)
    if reading in first:
        reading.result()
    return writing.result()


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--model", help="over the files': a folder, a hub id or made:PRESET")
    parser.add_argument("--tokens", type=script.at_least(1), default=16)
    args = parser.parse_args(argv)
    use_device(args.device)
    if not gpus_visible():
        raise script.UserError(
            "SGLang 0.5.23 hands a KV cache over from pinned memory, which needs a GPU's driver; "
            "run this where there are two GPUs"
        )
    script.start(__file__, args)
    wanted = settings(args.model)
    room = wanted["prefill"]["disaggregation-bootstrap-port"]
    servers = {}
    for side, own in wanted.items():
        model, port = options.make_models(own.pop("model")), own.pop("port")
        servers[side] = Server(model, "sglang", own, port=port)
    with ThreadPoolExecutor() as pool, servers["prefill"] as prefill, servers["decode"] as decode:
        answer = ask(pool, prefill.url, decode.url, room, args.tokens)
    print(PROMPT + answer["text"])
    return {"completion_tokens": answer["meta_info"]["completion_tokens"], "sides": 2}


def settings(model: str | None) -> dict[str, options.Options]:
    """Both files' options, on one node: a GPU each."""
    change = [f"model={model}"] if model else []
    if model and model.startswith("made:"):
        change.append(f"context-length={CONTEXT}")
    gpu = {"prefill": [], "decode": ["base-gpu-id=1"]}
    return {side: options.read(CONFIGS / f"{side}.yaml", change + own, engine="sglang") for side, own in gpu.items()}


if __name__ == "__main__":
    script.run(main)
