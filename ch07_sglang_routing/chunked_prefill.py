"""Chunked prefill in SGLang: a long prompt beside running answers, whole, in chunks, and in chunks mixed with decode.

You learn   that cutting a long prompt is not enough: SGLang lets prefill go first, so the chunks follow each other and
            the running answers wait as before; --enable-mixed-chunk puts their next tokens into each chunk's batch.
            With prompts of 100,000 tokens, as DeepSeek's contexts allow, that is seconds of silence or none
Laptop      python -m ch07_sglang_routing.chunked_prefill
GPU node    python -m ch07_sglang_routing.chunked_prefill --model 1b --long-prompt 3900 --chunk 512
Cluster     the same options in configs/*.yaml (DeepSeek-V3: chunks of 4096 and more, --enable-dp-attention)
You see     for each setting the longest gap between two tokens of the short requests, and the long one's first token
"""

from __future__ import annotations

import asyncio
import statistics
from typing import Any

import numpy as np

from ch06_vllm import load, stall, started
from ch07_sglang_routing import running
from common import script


def settings(chunk: int) -> dict[str, dict[str, Any]]:
    return {
        "whole": {"chunked-prefill-size": -1},
        "chunks": {"chunked-prefill-size": chunk},
        "mixed": {"chunked-prefill-size": chunk, "enable-mixed-chunk": True},
    }


def measure(own: dict[str, Any], args: Any, ids: np.ndarray) -> list[dict[str, float]]:
    """Each round: --running short requests decode, then the long prompt comes. The first round warms up."""
    rng, rows = np.random.default_rng(args.seed), []
    after = args.tokens
    with started.server(("sglang", args.model), own | {"max-prefill-tokens": 16384}) as server:
        for _ in range(args.rounds + 1):
            short = load.workload(ids, [stall.SHORT] * args.running, [stall.BEFORE + after] * args.running, rng)
            (long,) = load.workload(ids, [args.long_prompt], [2], rng)
            rows.append(stall.figures(*asyncio.run(stall.on_server(server.url, short, long))))
    return rows[1:]


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset (random weights, made once) or a model's folder")
    parser.add_argument("--long-prompt", type=script.at_least(2), default=3800)
    parser.add_argument("--chunk", type=script.at_least(1), default=256)
    parser.add_argument("--running", type=script.at_least(1), default=4, help="short requests that decode meanwhile")
    parser.add_argument(
        "--tokens", type=script.at_least(4), default=60, help="of each of them, once the long one comes"
    )
    parser.add_argument("--rounds", type=script.at_least(1), default=3)
    parser.add_argument(
        "--settings", type=script.comma_list(str), default=list(settings(1)), help="of: whole,chunks,mixed"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.settings) - set(settings(1)):
        raise script.UserError(f"no setting {sorted(unknown)[0]!r}; take of {','.join(settings(1))}")
    started.engine_name("sglang")
    script.start(__file__, args)
    ids = running.ids(args)
    found: dict[str, Any] = {"long_prompt": args.long_prompt, "chunk": args.chunk}
    for name in args.settings:
        rows = measure(settings(args.chunk)[name], args, ids)
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"{name:<8} longest gap {middle['itl_ms_max']:8.1f} ms   before {middle['itl_ms_before']:6.1f} ms   "
            f"first token of the long prompt {middle['long_ttft_ms']:8.1f} ms",
            flush=True,
        )
        found |= {f"{name}_{key}": value for key, value in middle.items()}
    if {"whole", "mixed"} <= set(args.settings):
        found["jump_times"] = found["whole_itl_ms_max"] / found["mixed_itl_ms_max"]
    return found


if __name__ == "__main__":
    script.run(main)
