"""One way of generating for many prompts, as a process that waits for its turn: ours, vLLM, or transformers.

Runs in the environment of the engine that it drives, so it imports nothing before it knows which.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from ch06_vllm.answer import in_turn

Requests = list[dict[str, Any]]  # {"prompt": token ids, "max_tokens": n}
Generate = Callable[[Requests], list[list[int]]]


def ours(model: str, options: dict[str, Any]) -> Generate:
    from ch06_vllm.engine import LLM, SamplingParams

    llm = LLM(model, **options)

    def generate(requests: Requests) -> list[list[int]]:
        params = [SamplingParams.exactly(r["max_tokens"]) for r in requests]
        return [output.token_ids for output in llm.generate([r["prompt"] for r in requests], params)]

    return generate


def vllm(model: str, options: dict[str, Any]) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: it must stand still between its turns
    from vllm import LLM, SamplingParams

    llm = LLM(model, **options)

    def generate(requests: Requests) -> list[list[int]]:
        params = [SamplingParams(max_tokens=r["max_tokens"], temperature=0, ignore_eos=True) for r in requests]
        prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    return generate


def transformers(model: str, options: dict[str, Any]) -> Generate:
    """Its batched generate: prompts padded on the left, and everybody goes on until the longest is done."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="sdpa").eval().to(device)
    network.generation_config.eos_token_id = None

    def generate(requests: Requests) -> list[list[int]]:
        longest, most = max(len(r["prompt"]) for r in requests), max(r["max_tokens"] for r in requests)
        padding = [longest - len(r["prompt"]) for r in requests]
        prompts = torch.tensor([[0] * p + r["prompt"] for p, r in zip(padding, requests, strict=True)], device=device)
        mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding], device=device)
        out = network.generate(
            prompts, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0, **options
        )
        return [row[longest : longest + r["max_tokens"]].tolist() for row, r in zip(out, requests, strict=True)]

    return generate


CONTESTANTS: dict[str, Callable[[str, dict[str, Any]], Generate]] = {
    "ours": ours,
    "vllm": vllm,
    "transformers": transformers,
}


def wait_for_turns(name: str, model: str, options: str) -> None:
    """What the process does: [requests] to {"seconds": ..., "tokens": [[...], ...]}; `options` is a JSON object."""

    def load() -> Callable[[Requests], dict[str, Any]]:
        generate = CONTESTANTS[name](model, json.loads(options))

        def answer(requests: Requests) -> dict[str, Any]:
            start = time.perf_counter()
            tokens = generate(requests)
            return {"seconds": time.perf_counter() - start, "tokens": tokens}

        return answer

    in_turn(load)
