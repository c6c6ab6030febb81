"""Greedy decoding as an explicit loop, with a KV cache and without: prefill once, then one token a step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from ch01_intro.roofline import synchronize


@dataclass(frozen=True)
class Generated:
    """Tokens [batch, new] and the host's clock when the prompt was sent and when each token was there."""

    tokens: torch.Tensor
    begun: float
    times: list[float]

    @property
    def prefill_s(self) -> float:
        return self.times[0] - self.begun

    @property
    def decode_s(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@torch.inference_mode()
def generate(model: nn.Module, prompts: torch.Tensor, new_tokens: int) -> Generated:
    """Greedy decoding with a KV cache. prompts: int64 [batch, length], all of the same length.

    Prefill runs the whole prompt once and keeps the keys and values of each layer; after that each step runs one token
    a sequence, which attends to what the cache holds.
    """
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    tokens, times, inputs = [], [], prompts
    synchronize(prompts.device)
    begun = time.perf_counter()
    for _ in range(new_tokens):
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        inputs = logits[:, -1].argmax(-1, keepdim=True)  # [batch, 1]: the only input of the next step
        tokens.append(inputs.cpu())  # a server must have the token on the host to send it: waits for the device
        times.append(time.perf_counter())
    return Generated(torch.cat(tokens, 1), begun, times)


@torch.inference_mode()
def generate_uncached(model: nn.Module, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The same by definition: run everything again for each new token. Tokens [batch, new]."""
    sequence = prompts
    for _ in range(new_tokens):
        logits = model(input_ids=sequence, use_cache=False, logits_to_keep=1).logits
        sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return sequence[:, prompts.shape[1] :].cpu()
