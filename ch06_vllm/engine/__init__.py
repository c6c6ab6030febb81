"""A small vLLM: paged KV cache, prefix cache, continuous batching, chunked prefill, preemption, tensor parallelism.

    from ch06_vllm.engine import LLM, SamplingParams
    for output in LLM("path/to/model").generate(["def main("], SamplingParams(max_tokens=32, temperature=0)):
        print(output.text)

In the order in which to read it: request, block_pool, scheduler, kernels, paged_attention, model, runner, sampler,
engine, llm; then server.
"""

from typing import Any

from ch06_vllm.engine.request import Config, SamplingParams

__all__ = ["LLM", "Config", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # brings the model, and with it transformers: only when asked for
        from ch06_vllm.engine.llm import LLM

        return LLM
    raise AttributeError(name)
