"""Requests that arrive over time, served by our engine step by step, or in batches by transformers' generate.

A custom workload is a JSONL file, a request a line:

    {"arrival_s": 0.5, "prompt": "def main(", "max_tokens": 32, "priority": 0}

`prompt` is text or token ids; the smaller the priority, the sooner (0 where it is missing), as in vLLM.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ch06_vllm.engine import SamplingParams
from ch06_vllm.engine.engine import Engine
from common.script import UserError


@dataclass(frozen=True)
class Arrival:
    """A request to be answered with exactly max_tokens tokens; at_s counts from the start of the run."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    priority: int = 0


def read(path: Path, encode: Callable[[str], list[int]], max_model_len: int) -> list[Arrival]:
    """The requests of a JSONL file, by arrival.

    Raises:
        UserError: with file and line, for one that is no request or does not fit into the model's context.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); --workload is a JSONL file") from None
    arrivals = []
    for number, line in enumerate(lines, 1):
        try:
            arrival = parsed(json.loads(line), encode)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: no request; a line has arrival_s (0 or more), prompt (text or ids), max_tokens (1 "
                "or more) and perhaps priority (a whole number)"
            ) from None
        if len(arrival.prompt) + arrival.max_tokens > max_model_len:
            raise UserError(
                f"{path}:{number}: {len(arrival.prompt)} prompt and {arrival.max_tokens} new tokens exceed the context "
                f"of {max_model_len}; shorten them, or raise --max-model-len"
            )
        arrivals.append(arrival)
    if not arrivals:
        raise UserError(f"{path} is empty; --workload needs a line for each request")
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def parsed(row: dict[str, Any], encode: Callable[[str], list[int]]) -> Arrival:
    prompt, at_s, tokens, priority = row["prompt"], row["arrival_s"], row["max_tokens"], row.get("priority", 0)
    prompt = encode(prompt) if isinstance(prompt, str) else prompt
    numbers = [*prompt, tokens, priority]
    if not (prompt and tokens >= 1 and 0 <= at_s < math.inf and all(type(number) is int for number in numbers)):
        raise ValueError
    return Arrival(float(at_s), prompt, tokens, priority)


@dataclass
class Served:
    """One request. It has `slot` of the batch from admitted_s to released_s, and its last token at done_s.

    In a static batch released_s is later than done_s: when the longest of the batch has its last token, and generate
    returns. Seconds since the start of the run.
    """

    index: int
    arrived_s: float
    tokens: int
    priority: int
    slot: int = 0
    admitted_s: float = math.nan
    first_s: float = math.nan
    done_s: float = math.nan
    released_s: float = math.nan


def expected(arrivals: Sequence[Arrival]) -> list[Served]:
    return [Served(number, a.at_s, a.max_tokens, a.priority) for number, a in enumerate(arrivals)]


def continuous(engine: Engine, arrivals: Sequence[Arrival], *, priorities: bool = True) -> list[Served]:
    """Each step is a new batch: who has arrived may join, who is done leaves."""
    served = expected(arrivals)
    free = list(range(engine.config.max_num_seqs))
    arriving = iter(zip(served, arrivals, strict=True))
    following = next(arriving, None)
    began = time.perf_counter()
    while following or engine.has_work:
        now = time.perf_counter() - began
        while following and following[0].arrived_s <= now:
            one, arrival = following
            priority = arrival.priority if priorities else 0
            engine.add(
                arrival.prompt, SamplingParams.exactly(arrival.max_tokens), priority=priority, request_id=str(one.index)
            )
            following = next(arriving, None)
        if not engine.has_work and following:
            time.sleep(following[0].arrived_s - now)
            continue
        outputs = engine.step()
        after = time.perf_counter() - began
        names = [request.request_id for request in engine.scheduler.running] + [o.request_id for o in outputs]
        for one in (served[int(name)] for name in names):
            if math.isnan(one.admitted_s):
                one.admitted_s, one.slot = now, free.pop(0)
        for output in outputs:
            one = served[int(output.request_id)]
            if math.isnan(one.first_s):
                one.first_s = after
            if output.finish_reason:
                one.done_s = one.released_s = after
                free = sorted([*free, one.slot])
    return served


class Static:
    """transformers' `generate` on left-padded batches of what has arrived; the next one starts when it returns.

    It pads twice: short prompts on their left, and short answers up to the longest of the batch.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        model.eval()
        model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)

    def __call__(self, arrivals: Sequence[Arrival]) -> list[Served]:
        served = expected(arrivals)
        waiting = list(zip(served, arrivals, strict=True))
        began = time.perf_counter()
        while waiting:
            now = time.perf_counter() - began
            arrived = [pair for pair in waiting if pair[0].arrived_s <= now]
            if not arrived:
                time.sleep(waiting[0][0].arrived_s - now)
                continue
            batch = sorted(arrived, key=lambda pair: (pair[0].priority, pair[0].index))[: self.batch_size]
            waiting = [pair for pair in waiting if pair not in batch]
            ticks = [tick - began for tick in self.generate([arrival for _, arrival in batch])]
            for slot, (one, _) in enumerate(batch):
                one.slot, one.admitted_s, one.released_s = slot, now, ticks[-1]
                one.first_s, one.done_s = ticks[0], ticks[one.tokens - 1]
        return served

    @torch.inference_mode()
    def generate(self, batch: Sequence[Arrival]) -> list[float]:
        """When each step was done (perf_counter): as many as the longest answer has tokens."""
        width = max(len(arrival.prompt) for arrival in batch)
        pads = [width - len(arrival.prompt) for arrival in batch]
        ids = torch.tensor([[0] * pad + arrival.prompt for pad, arrival in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        ticks: list[float] = []

        def tick(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            ticks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        device = self.model.device
        longest = max(arrival.max_tokens for arrival in batch)
        self.model.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=longest, stopping_criteria=[tick]
        )
        return ticks
