"""The engine as a plain Python class, for many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.request import Config, Output, SamplingParams


class LLM:
    """
    Args:
        model: a local Hugging Face folder or a hub id.
        settings: the fields of Config.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.engine = Engine(Config(model, **settings))

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """All outputs, in the order of the prompts; a prompt is a text or its tokens."""
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else params
        outputs: dict[str, Output] = {}
        try:
            for prompt, wanted in zip(prompts, each, strict=True):
                tokens = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                request_id = self.engine.add(tokens, wanted)
                outputs[request_id] = Output(request_id)
            while self.engine.has_work:
                for step in self.engine.step():
                    outputs[step.request_id].add(step)
        finally:  # interrupted, or a prompt was refused: nothing stays queued
            for request_id in outputs:
                self.engine.cancel(request_id)
        return list(outputs.values())
