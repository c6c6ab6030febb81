"""One KV cache for several engines: within an engine, across replicas by routing, and by handing blocks over.

You learn   three ways to not compute a prefix again, what each needs and saves; how a block's hash makes it findable in
            a cache that never computed it (prefill-decode disaggregation rests on this)
Laptop      python -m ch07_sglang_routing.kv_handover
GPU node    python -m ch07_sglang_routing.kv_handover --preset 1b --prompt-tokens 1536
Cluster     the same idea between hosts is NIXL's and Mooncake's work: RDMA in place of this socket
You see     a table: milliseconds to the first token without and with the cache, bytes and milliseconds on the way, and
            that all answers are the same, token for token

Two engines of chapter 6 in two processes. One computes a prompt and sends the full blocks of its KV cache through a
socket, each under the hash of its tokens and of all before them; the other writes them into free blocks of its own and
publishes them in its prefix cache. Its scheduler needs to know nothing: it finds a prefix.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ch06_vllm import answer, load, turns
from ch06_vllm.engine import Config, SamplingParams
from ch06_vllm.engine.block_pool import block_hash
from ch06_vllm.engine.engine import Engine
from ch06_vllm.started import folder_of
from common import lm, script

Json = dict[str, Any]
WAIT_S = 60.0


def hashes(tokens: list[int], size: int) -> list[bytes]:
    """Of all full blocks of a prompt, in order."""
    found: list[bytes] = []
    for end in range(size, len(tokens) + 1, size):
        found.append(block_hash(found[-1] if found else b"", tokens[end - size : end]))
    return found


def take_out(engine: Engine, tokens: list[int]) -> tuple[list[bytes], torch.Tensor]:
    """What the prefix cache has of it: hashes, and [blocks, layers, 2 (keys, values), size, kv_heads, head_dim]."""
    names = hashes(tokens, engine.pool.block_size)
    blocks = engine.pool.match(names)
    caches = engine.runner.model.caches
    parts = [torch.stack([cache.keys[blocks], cache.values[blocks]], dim=1) for cache in caches]
    return names[: len(blocks)], torch.stack(parts, dim=1).cpu()


def put_in(engine: Engine, names: list[bytes], data: torch.Tensor) -> int:
    """Into the prefix cache; how many blocks were new there. Between two steps only.

    Raises:
        ValueError: the data is of another model, another type or other blocks.
    """
    caches = engine.runner.model.caches
    keys = caches[0].keys
    if data.shape != (len(names), len(caches), 2, *keys.shape[1:]) or data.dtype != keys.dtype:
        raise ValueError(
            f"blocks of {tuple(data.shape)} {data.dtype} are not those of this engine; take equal settings"
        )
    places = engine.pool.take_in(names)
    source, target = list(places), list(places.values())
    for number, cache in enumerate(caches):
        cache.keys[target] = data[source, number, 0].to(keys.device)
        cache.values[target] = data[source, number, 1].to(keys.device)
    return len(places)


def send(address: tuple[str, int], names: list[bytes], data: torch.Tensor) -> int:
    """A line of JSON, the hashes, the bytes; how many bytes of keys and values."""
    head = {"shape": list(data.shape), "dtype": str(data.dtype).removeprefix("torch."), "hash_bytes": 32}
    raw = data.contiguous().view(torch.uint8).numpy().tobytes()
    with socket.create_connection(address, timeout=WAIT_S) as out:
        out.sendall(json.dumps(head).encode() + b"\n" + b"".join(names) + raw)
    return len(raw)


def receive(server: socket.socket) -> tuple[list[bytes], torch.Tensor]:
    """What `send` sent, whole.

    Raises:
        EOFError: the sender left before.
    """
    connection, _ = server.accept()
    connection.settimeout(WAIT_S)
    with connection, connection.makefile("rb") as lines:
        head = json.loads(lines.readline() or "{}")
        if not head:
            raise EOFError("the sender left before it said anything")
        names = [lines.read(head["hash_bytes"]) for _ in range(head["shape"][0])]
        dtype = getattr(torch, head["dtype"])
        wanted = int(np.prod(head["shape"])) * dtype.itemsize
        raw = bytearray(lines.read(wanted))
        if len(raw) != wanted:
            raise EOFError(f"{len(raw)} of {wanted} bytes came; see why the sender left")
    return names, torch.frombuffer(raw, dtype=dtype).view(head["shape"])


class Worker:
    """An engine that is asked by lines of JSON (ch06_vllm/turns.py)."""

    def __init__(self, config: Config) -> None:
        self.engine = Engine(config)
        self.arrived: list[tuple[list[bytes], torch.Tensor]] = []

    def __call__(self, question: Json) -> Json:
        return getattr(self, question.pop("do"))(**question)

    def generate(self, tokens: list[int], output: int) -> Json:
        engine = self.engine
        began = time.perf_counter()
        engine.add(tokens, SamplingParams.exactly(output))
        answered: list[int] = []
        cached = first_s = 0.0
        while engine.has_work:
            for step in engine.step():
                first_s = first_s or time.perf_counter() - began
                answered += step.token_ids
                cached = step.cached_tokens
        engine.scheduler.check()
        return {"tokens": answered, "ttft_s": first_s, "cached": cached}

    def forget(self) -> Json:
        self.engine.pool.forget_all()
        return {}

    def listen(self) -> Json:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(WAIT_S)
        self.thread = threading.Thread(target=lambda: self.arrived.append(receive(self.server)), daemon=True)
        self.thread.start()
        return {"port": self.server.getsockname()[1]}

    def send(self, tokens: list[int], port: int) -> Json:
        began = time.perf_counter()
        names, data = take_out(self.engine, tokens)
        sent = send(("127.0.0.1", port), names, data)
        return {"blocks": len(names), "bytes": sent, "seconds": time.perf_counter() - began}

    def put_in(self) -> Json:
        began = time.perf_counter()
        self.thread.join(WAIT_S)
        self.server.close()
        if not self.arrived:
            raise EOFError("no blocks came; see the sending engine's error")
        new = put_in(self.engine, *self.arrived.pop())
        self.engine.scheduler.check()
        return {"new": new, "seconds": time.perf_counter() - began}


def worker(model: str, settings: str) -> None:
    answer.in_turn(lambda: Worker(Config(model, **json.loads(settings))))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--prompt-tokens", type=script.at_least(32), default=1024)
    parser.add_argument("--output-tokens", type=script.at_least(2), default=16)
    parser.add_argument("--rounds", type=script.at_least(1), default=5)
    return parser.parse_args(argv)


def one_round(ask: list[Callable[[Json], Json]], tokens: list[int], output: int) -> dict[str, Json]:
    """A prompt by each way to share; both caches are empty at the start of each."""

    def generate(engine: int) -> Json:
        return ask[engine]({"do": "generate", "tokens": tokens, "output": output})

    def forget() -> None:
        for engine in ask:
            engine({"do": "forget"})

    found: dict[str, Json] = {}
    forget()
    found["nothing shared"] = generate(1)
    found["within an engine"] = generate(1)  # its prefix cache
    forget()
    generate(0)
    found["routed elsewhere"] = generate(1)  # by a router that is blind to caches
    found["routed to its cache"] = generate(0)
    forget()
    generate(0)
    port = ask[1]({"do": "listen"})["port"]
    began = time.perf_counter()
    sent = ask[0]({"do": "send", "tokens": tokens, "port": port})
    ask[1]({"do": "put_in"})
    handed_s = time.perf_counter() - began
    found["handed over"] = generate(1) | {"bytes": sent["bytes"], "blocks": sent["blocks"], "handed_s": handed_s}
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    model = args.model or folder_of(args.preset)
    script.start(__file__, args)
    length = args.prompt_tokens + args.output_tokens
    config = {"device": args.device, "max_model_len": length, "num_blocks": 2 * (-(-length // 16) + 1)}
    ids = load.usable_ids(Path(model))
    rounds: list[dict[str, Json]] = []
    with contextlib.ExitStack() as stack:
        call = "ch07_sglang_routing.kv_handover:worker"
        engines = [
            stack.enter_context(turns.Process(name, call, str(model), json.dumps(config), engine="ours"))
            for name in ("prefill engine", "decode engine")
        ]
        for engine in engines:
            engine.ready()
        for number in range(args.rounds + 1):  # the first warms up
            tokens = np.random.default_rng((args.seed, number)).choice(ids, args.prompt_tokens).tolist()
            rounds.append(one_round([engine.ask for engine in engines], tokens, args.output_tokens))
    rounds = rounds[1:]
    ways = list(rounds[0])
    ms = {way: statistics.median(one[way]["ttft_s"] for one in rounds) * 1e3 for way in ways}
    moved = rounds[0]["handed over"]
    handed_ms = statistics.median(one["handed over"]["handed_s"] for one in rounds) * 1e3
    print(f"{'a prompt of ' + str(args.prompt_tokens) + ' tokens':<26}{'cached':>8}{'TTFT ms':>10}   the same tokens")
    for way in ways:
        same = all(one[way]["tokens"] == one["nothing shared"]["tokens"] for one in rounds)
        print(f"{way:<26}{rounds[0][way]['cached']:>8}{ms[way]:>10.2f}   {'yes' if same else 'NO'}")
    print(f"handed over: {moved['blocks']} blocks, {moved['bytes'] / 2**20:.2f} MiB in {handed_ms:.2f} ms")
    return {
        "prompt_tokens": args.prompt_tokens,
        "same_tokens": all(one[way]["tokens"] == one["nothing shared"]["tokens"] for one in rounds for way in ways),
        "elsewhere_cached": rounds[0]["routed elsewhere"]["cached"],
        "handed_cached": moved["cached"],
        "handed_blocks": moved["blocks"], "handed_bytes": moved["bytes"], "handed_ms": handed_ms,
        "ttft_ms": ms, "prefill_saved_times": ms["nothing shared"] / ms["handed over"],
        "with_transfer_times": ms["nothing shared"] / (ms["handed over"] + handed_ms),
    }  # fmt: skip


if __name__ == "__main__":
    script.run(main)
