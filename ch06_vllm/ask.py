"""Serve a model, ask it something, watch the tokens come: the whole path from a folder on disk to streamed text.

You learn   what stands between a trained model and its user: a server that is ready when /health says so, a streamed
            answer, and how to tell the time to its first token from the pace of the others
Laptop      python ch06_vllm/ask.py --model runs/my-model "class Reader:"     (--engine vllm for the real one)
GPU node    the same
Cluster     the same on one node; launch/ has several
You see     the text as it streams, then tokens/s alone and with eight asking at once: a step costs little more for
            eight than for one, which is why servers batch
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from ch06_vllm.client import Answer, Client
from ch06_vllm.engine.request import SamplingParams
from ch06_vllm.servers import Server
from ch06_vllm.started import engine_name, folder_of
from common import script

TOGETHER = 8


async def ask(server: Server, prompt: str, sampling: dict) -> Answer:
    """Stream one answer to the terminal."""
    async with Client(server.url) as client:
        answer = Answer(time.perf_counter())
        body = {"model": server.model, "prompt": prompt, **sampling}
        print(prompt, end="", flush=True)
        async with client.stream("/v1/completions", body) as chunks:
            async for chunk in chunks:
                print(chunk.text, end="", flush=True)
                if chunk.tokens:
                    answer.arrivals_s.append(chunk.at_s)
                if usage := chunk.body.get("usage"):
                    answer.completion_tokens = usage["completion_tokens"]
        print()
        return answer


async def ask_together(server: Server, prompt: str, sampling: dict) -> float:
    """Tokens/s of several answers at once."""
    async with Client(server.url) as client:
        start = time.perf_counter()
        asked = [
            client.complete(prompt, model=server.model, **sampling | {"seed": seed, "ignore_eos": True})
            for seed in range(TOGETHER)
        ]
        answers = await asyncio.gather(*asked)
        return sum(answer.completion_tokens or 0 for answer in answers) / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    script.start(__file__, args)
    model = args.model or folder_of("nano")
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    with Server(model, args.engine) as server:
        print(f"{args.engine} serves {server.model} at {server.url}, {server.start_s:.1f} s after its start\n")
        asyncio.run(ask_together(server, args.prompt, sampling))  # the first requests of a server are slow
        answer = asyncio.run(ask(server, args.prompt, sampling))
        together = asyncio.run(ask_together(server, args.prompt, sampling))
    tokens, spent_s = answer.completion_tokens or 0, answer.arrivals_s[-1] - answer.called_s
    result = {"engine": args.engine, "start_s": server.start_s, "new_tokens": tokens, "tokens_per_s": tokens / spent_s}
    result |= {"ttft_ms": 1e3 * (answer.arrivals_s[0] - answer.called_s), "tokens_per_s_of_8": together}
    print(
        f"\n{tokens} tokens, the first after {result['ttft_ms']:.0f} ms, {result['tokens_per_s']:,.0f} tokens/s; "
        f"{TOGETHER} at once: {together:,.0f} tokens/s"
    )
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("prompt", nargs="?", default="def ")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: nano with random weights)")
    parser.add_argument("--engine", type=engine_name, default="ours", help="ours or vllm")
    parser.add_argument("--max-tokens", type=script.at_least(1), default=120)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    args = parser.parse_args(argv)
    try:
        SamplingParams(args.max_tokens, args.temperature)
    except ValueError as error:
        raise script.UserError(str(error)) from None
    return args


if __name__ == "__main__":
    script.run(main)
