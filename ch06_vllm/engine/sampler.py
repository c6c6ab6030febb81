"""The next token of many requests at once, each with its own temperature, top-k, top-p and random numbers.

A request draws one uniform number u a token, and takes the token at which the cumulative probability passes u. So its
tokens depend on its own seed alone, not on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ch06_vllm.engine.request import Logprob, Request


def sample(logits_nv: torch.Tensor, requests: Sequence[Request]) -> tuple[list[int], list[Logprob | None]]:
    """
    Args:
        logits_nv: [requests, vocabulary].

    Returns:
        A token for each, and what it asked for in log-probabilities.
    """
    chosen = logits_nv.argmax(dim=-1)
    if drawn := [row for row, request in enumerate(requests) if request.params.temperature > 0]:
        chosen[drawn] = _draw(logits_nv[drawn].float(), [requests[row] for row in drawn])
    tokens: list[int] = chosen.tolist()
    logprobs: list[Logprob | None] = [None] * len(requests)
    for row, request in enumerate(requests):
        if request.params.logprobs is not None:
            logprobs[row] = _logprob(logits_nv[row].float(), tokens[row], request.params.logprobs)
    return tokens, logprobs


def _draw(logits_nv: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    params = [request.params for request in requests]
    temperature, top_p = (
        torch.tensor(x, device=logits_nv.device).unsqueeze(1)
        for x in ([max(p.temperature, 1e-5) for p in params], [p.top_p for p in params])
    )
    u = torch.tensor([[request.random.random()] for request in requests], device=logits_nv.device)
    probabilities = (logits_nv / temperature).softmax(dim=-1)
    chosen = _pass(probabilities.cumsum(dim=-1), u)
    # Only these in order of likelihood: a request must not draw another token because its neighbour has a top_k.
    if cut := [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]:
        ordered, order = probabilities[cut].sort(dim=-1, descending=True, stable=True)
        vocabulary = ordered.shape[1]
        top_k = torch.tensor([[params[row].top_k or vocabulary] for row in cut], device=logits_nv.device)
        ordered = ordered.masked_fill(torch.arange(vocabulary, device=ordered.device) >= top_k, 0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p[cut], 0)  # the most likely one always stays
        chosen[cut] = order.gather(1, _pass(ordered.cumsum(dim=-1), u[cut]).unsqueeze(1)).squeeze(1)
    return chosen


def _pass(cumulative: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Where each row passes the share u of its total, which rounding may leave a little off 1; never later than where
    it reaches the total, as what follows there has probability 0."""
    total = cumulative[:, -1:].contiguous()
    passed = torch.searchsorted(cumulative, u.to(cumulative.dtype) * total, right=True)
    return torch.minimum(passed, torch.searchsorted(cumulative, total)).squeeze(1)


def _logprob(logits_v: torch.Tensor, token: int, count: int) -> Logprob:
    logprobs = logits_v.log_softmax(dim=-1)
    top = logprobs.topk(count)
    return Logprob(token, float(logprobs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
