"""The engine: requests in, a step at a time, tokens and text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ch06_vllm.engine.block_pool import BlockPool
from ch06_vllm.engine.detokenizer import Detokenizer
from ch06_vllm.engine.model import Shard
from ch06_vllm.engine.request import Config, Logprob, Output, Request, SamplingParams
from ch06_vllm.engine.runner import Runner
from ch06_vllm.engine.sampler import sample
from ch06_vllm.engine.scheduler import Scheduler
from common import lm


class Engine:
    """Not thread-safe: whoever owns it adds, cancels and steps in one thread.

    Under tensor parallelism this runs on rank 0; the other ranks have a Runner each, which follows.
    """

    def __init__(self, config: Config, device: torch.device | None = None, shard: Shard | None = None) -> None:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = config
        self.runner = Runner(config, device or torch.device(auto if config.device == "auto" else config.device), shard)
        self.pool = BlockPool(self.runner.num_blocks, config.block_size, caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(config, self.pool)
        self.tokenizer = lm.load_tokenizer(str(self.runner.model.folder))
        self.requests: dict[str, Request] = {}
        self.max_len = self.runner.model.max_len
        self.vocab_size: int = self.runner.model.config.vocab_size
        self._detokenizers: dict[str, Detokenizer] = {}
        self._end_tokens, self.default_sampling = self._read_generation_config()
        self._number = 0

    def _read_generation_config(self) -> tuple[set[int], dict[str, Any]]:
        """What ends a text (a chat model may have several tokens for it), and the sampling that the model asks for."""
        from transformers import GenerationConfig

        try:
            config = GenerationConfig.from_pretrained(self.runner.model.folder)
            found: Any = config.eos_token_id
        except OSError:
            config, found = GenerationConfig(), self.runner.model.config.eos_token_id
        asked = config.to_diff_dict()
        sampling = {name: asked[name] for name in ("temperature", "top_k", "top_p") if asked.get(name) is not None}
        return set(found if isinstance(found, list) else [found]) - {None}, sampling

    def add(
        self, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0, request_id: str | None = None
    ) -> str:
        """Queue a request. The smaller its priority, the sooner it is served, as in vLLM.

        Returns:
            Its id, under which `step` answers.

        Raises:
            ValueError: the prompt is empty, too long, or has a token that is none.
        """
        self.check(prompt, params)
        self._number += 1
        request_id = request_id or f"request-{self._number}"
        if request_id in self.requests:
            raise ValueError(f"there is a request {request_id!r} already")
        seed = hash((self.config.seed, self._number))
        self.requests[request_id] = request = Request(request_id, list(prompt), params, priority, self._number, seed)
        self._detokenizers[request_id] = Detokenizer(self.tokenizer.backend_tokenizer, request.tokens, params.stop)
        self.scheduler.add(request)
        return request_id

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """
        Raises:
            ValueError: as add says.
        """
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt) + params.max_tokens > self.max_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, together more than the "
                f"model's context of {self.max_len}; shorten the one or the other"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise ValueError(f"the prompt has a token outside 0 to {self.vocab_size - 1}")

    def cancel(self, request_id: str) -> bool:
        """Take a request out; its blocks are free at once. False if it is not there (any more)."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._finish(request)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Output]:
        """One pass through the model; what it brought to each request that got a token."""
        shares = self.scheduler.schedule()
        if not shares:
            return []
        logits = self.runner.run(shares)
        for share in shares:
            self.scheduler.computed(share)
        sampling = [share.request for share in shares if share.samples]
        if logits is None:
            return []
        tokens, logprobs = sample(logits, sampling)
        return [self._advance(*one) for one in zip(sampling, tokens, logprobs, strict=True)]

    def _advance(self, request: Request, token: int, logprob: Logprob | None) -> Output:
        """Append the token, and end the request where it must end."""
        request.tokens.append(token)
        output = Output(request.request_id, [token], prompt_tokens=request.num_prompt, cached_tokens=request.num_cached)
        if logprob is not None:
            output.logprobs.append(logprob)
        params, detokenizer = request.params, self._detokenizers[request.request_id]
        stop_text = None
        if token in self._end_tokens and not params.ignore_eos:
            output.finish_reason = "stop"
        else:
            output.text, stop_text = detokenizer.add(token)
            if stop_text is not None:
                output.finish_reason, output.stop_reason = "stop", stop_text
            elif request.num_output == params.max_tokens:
                output.finish_reason = "length"
        if output.finish_reason:
            if stop_text is None:
                output.text += detokenizer.rest()
            self._finish(request)
        return output

    def _finish(self, request: Request) -> None:
        self.scheduler.finish(request)
        del self.requests[request.request_id], self._detokenizers[request.request_id]
