"""The engine as a plain Python class, for many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.model import Shard
from ch06_vllm.engine.request import Config, Output, SamplingParams
from ch06_vllm.engine.runner import Runner
from common.dist import pick_device, read_launch

Prompts = str | Sequence[str | Sequence[int]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """Within dist.session its ranks share one model (tensor parallel): all make it, and all call generate alike.

    Args:
        model: a local Hugging Face folder or a hub id.
        settings: the fields of Config.

    Attributes:
        engine: None on the ranks that follow rank 0.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        config = Config(model, **settings)
        self.shard = Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Shard()
        device = pick_device(config.device, read_launch())
        self.engine = Engine(config, device, self.shard) if self.shard.rank == 0 else None
        self.runner = self.engine.runner if self.engine else Runner(config, device, self.shard)

    def generate(self, prompts: Prompts, params: Params = None) -> list[Output]:
        """All outputs, in the order of the prompts, on every rank; a prompt is a text or its tokens."""
        if self.shard.world_size == 1:
            return self._generate(prompts, params)
        said: list[list[Output] | Exception | None] = [None]
        if self.engine is None:
            self.runner.follow()
        else:
            try:
                said[0] = self._generate(prompts, params)
            except Exception as error:  # the others must hear of it, they wait
                said[0] = error
            self.runner.stop()
        dist.broadcast_object_list(said)
        if isinstance(said[0], Exception):
            raise said[0]
        assert said[0] is not None
        return said[0]

    def _generate(self, prompts: Prompts, params: Params) -> list[Output]:
        assert self.engine
        prompts = [prompts] if isinstance(prompts, str) else prompts
        params = params or SamplingParams(**self.engine.default_sampling)
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
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
