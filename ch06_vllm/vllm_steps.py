"""vLLM stepped by hand as a process of turns.py: what its cache holds after every step. Runs in vLLM's environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from ch06_vllm.answer import in_turn

COUNTERS = ("prefix_cache_hits", "prefix_cache_queries", "num_preemptions")


def load(model: str, options: dict[str, Any]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """[{"prompt": ids, "max_tokens": n}, …], all at once, to {"block_size", "seconds", "steps", the counters}.

    A step is {"at_s", "taken": blocks, "running": [[prompt, max_tokens, computed tokens], …]}.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, or there is nothing to step
    from vllm import LLM, SamplingParams

    llm = LLM(model, disable_log_stats=False, **options)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool

    def counters() -> dict[str, float]:
        return {metric.name.removeprefix("vllm:"): getattr(metric, "value", 0) for metric in llm.get_metrics()}

    def answer(requests: list[dict[str, Any]]) -> dict[str, Any]:
        before, steps = counters(), []
        for number, request in enumerate(requests):
            params = SamplingParams(max_tokens=request["max_tokens"], temperature=0, ignore_eos=True)
            engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, params)
        began = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
            running = [[r.num_prompt_tokens, r.max_tokens, r.num_computed_tokens] for r in scheduler.running]
            taken = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # block 0 pads tables, and is not lent
            steps.append({"at_s": time.perf_counter() - began, "taken": taken, "running": running})
        now = counters()
        found = {name: now[name] - before[name] for name in COUNTERS}
        block_size = engine.vllm_config.cache_config.block_size
        return found | {"block_size": block_size, "seconds": time.perf_counter() - began, "steps": steps}

    return answer


def main(model: str, options: str) -> None:
    in_turn(lambda: load(model, json.loads(options)))
