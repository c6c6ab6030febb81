"""What the engine is told, what a caller asks for, and what is kept of a request while it runs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum

from common.script import UserError

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Config:
    """How the engine is set up. Names and meanings are vLLM's, so that a setting found here can be used there.

    Args:
        model: a local Hugging Face folder or a hub id, of the Llama or Qwen3 family.
        dtype: auto is what the checkpoint says; else bfloat16, float16, float32 or float64.
        block_size: tokens a block of the KV cache holds.
        num_blocks: None takes what fits into `kv_cache_gib`.
        kv_cache_gib: None: 1 GiB on a CPU, 90 % of what the weights leave of a GPU.
        max_num_seqs: requests that run at once, at most.
        max_num_batched_tokens: tokens a step computes, at most, prompts and new tokens together.
        max_model_len: tokens of a request, prompt and output; None is what the model was made for.
        enable_chunked_prefill: a prompt may be computed in parts, beside the tokens of running requests.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_gib: float | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; take one of {', '.join(DTYPES)}")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; take at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UserError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "running requests need a token each; raise the one or lower the other"
            )


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the smallest set of most likely tokens whose probabilities add up to it.
        seed: the same seed gives the same tokens, whatever else runs; None draws one.
        stop: texts that end the output and are cut off.
        ignore_eos: go on to max_tokens. For benchmarks.
        logprobs: also the log-probabilities of the chosen and of that many most likely tokens, before temperature.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # else each of its letters would be one
            object.__setattr__(self, "stop", (self.stop,))
        for fine, what in (
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; take at least 1"),
            (0 <= self.temperature < float("inf"), f"temperature is {self.temperature}; take 0 or more"),
            (self.top_k >= 0, f"top_k is {self.top_k}; take 0 (all) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; take a number above 0, at most 1"),
            (all(self.stop), "a stop text is empty; leave it out"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, f"logprobs is {self.logprobs}; take 0 to 20"),
        ):
            if not fine:
                raise ValueError(what)

    @classmethod
    def exactly(cls, tokens: int) -> SamplingParams:
        """The likeliest so many tokens, whatever they are: an answer of a length known beforehand, for benchmarks."""
        return cls(tokens, temperature=0, ignore_eos=True)


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms of probabilities at one position: of the chosen token, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most likely first


@dataclass
class Output:
    """What one step brought to one request; LLM.generate adds a request's steps up to one.

    finish_reason is None while it runs, then stop, length, or abort for a cancelled one.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None  # the stop text that ended it; None for an end token, as in vLLM
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache

    def add(self, step: Output) -> None:
        self.token_ids += step.token_ids
        self.text += step.text
        self.logprobs += step.logprobs
        self.finish_reason, self.stop_reason = step.finish_reason, step.stop_reason
        self.prompt_tokens, self.cached_tokens = step.prompt_tokens, step.cached_tokens


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One sequence. Its tokens are the truth; blocks and num_computed say how many of them the KV cache holds."""

    def __init__(
        self, request_id: str, prompt: list[int], params: SamplingParams, priority: int, number: int, seed: int
    ) -> None:
        self.request_id, self.params = request_id, params
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.order = (priority, number)  # the smaller is served first and preempted last
        self.random = random.Random(seed if params.seed is None else params.seed)
        self.status = Status.WAITING
        self.blocks: list[int] = []
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.num_cached = 0  # of the prompt, found there at the first admission
        self.num_preemptions = 0
        self.scheduled_s = 0.0  # when it first left the queue, by time.perf_counter
        self.hashes: list[bytes] = []  # of its full blocks, as far as they were asked for

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that must be computed before the next one is known: 1 while it generates."""
        return len(self.tokens) - self.num_computed
