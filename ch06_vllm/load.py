"""A load for a server: what is asked (workload), when (arrivals), sending it, what the answers' times mean (metrics).

An open loop sends by a schedule that does not look at the answers, as independent users do: a slow server gets a queue.
A closed loop keeps N requests in flight: a slow server is asked less, and the worst waits are never seen (Tene,
"coordinated omission"). Where the sender itself is late (its lag, measured here), a latency counted from the scheduled
arrival still tells what a user would have seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ch06_vllm.client import Client, RequestFailed
from common.script import UserError

PERCENTILES = (50, 90, 95, 99)
BLOCK_OF_HASH = 512  # tokens that one of a trace's hash_ids stands for (Mooncake, FAST 2025)


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Request:
    """prompt: token ids, or a text. The answer is to have max_tokens tokens exactly (ignore_eos)."""

    prompt: list[int] | str
    max_tokens: int


def usable_ids(model: Path) -> np.ndarray:
    """Ids of a Hugging Face folder's tokenizer that may stand in a prompt: all but the special ones.

    Raises:
        UserError: no tokenizer.json there, or one that cannot be read.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"no {file}; --model is the folder that the server loads, its tokenizer gives the prompts' ids")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"cannot read {file} ({error}); copy the model's tokenizer again") from None
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    size = tokenizer.get_vocab_size()
    with contextlib.suppress(OSError, ValueError, KeyError):  # a model may know fewer ids than its tokenizer
        size = min(size, json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    return np.array([token_id for token_id in range(size) if token_id not in special])


def lengths(text: str) -> Callable[[np.random.Generator, int], np.ndarray]:
    """argparse type: a distribution of token counts.

    `128` is exactly that; `64-256` uniform, both ends included; `lognormal:128,0.8` has that median and that sigma of
    the logarithm, the shape of published prompt lengths, and is at least 1.
    """
    try:
        if text.startswith("lognormal:"):
            median, sigma = map(float, text.removeprefix("lognormal:").split(","))
            if not (median >= 1 and 0 <= sigma < math.inf):
                raise ValueError
            return lambda rng, n: np.maximum(1, np.rint(rng.lognormal(math.log(median), sigma, n))).astype(int)
        low, _, high = text.partition("-")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise ValueError
    except ValueError:
        raise UserError(f"{text!r} is no length in tokens; give 128, 64-256 or lognormal:128,0.8") from None
    return lambda rng, n: rng.integers(first, last + 1, n)


def workload(
    ids: np.ndarray,
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    rng: np.random.Generator,
    *,
    shared_prefix: int = 0,
    prefixes: int = 1,
) -> list[Request]:
    """Requests of exactly these lengths. `shared_prefix` tokens, one of `prefixes` drawn at random, stand in front.

    The rest of each prompt is drawn anew, so that nothing else is shared: a prefix cache helps with the prefix alone.
    """
    heads = [rng.choice(ids, shared_prefix).tolist() for _ in range(prefixes)]
    return [
        Request(heads[rng.integers(prefixes)] + rng.choice(ids, int(asked)).tolist(), int(answered))
        for asked, answered in zip(prompt_tokens, output_tokens, strict=True)
    ]


# ---------------------------------------------------------------- when


def arrivals(rate: float, n: int, rng: np.random.Generator, burstiness: float = 1.0) -> np.ndarray:
    """Seconds from the start at which n requests arrive, the last one at n / rate.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, below 1 arrivals come
    in bursts (the gaps' coefficient of variation is 1 / sqrt(burstiness)), infinity is a constant rate. As in `vllm
    bench serve` the sum of the gaps is then scaled to n / rate, so that seeds differ in pattern but not in load.
    An infinite rate sends all at once.
    """
    if math.isinf(rate):
        return np.zeros(n)
    gaps = np.full(n, 1.0) if math.isinf(burstiness) else rng.gamma(burstiness, 1 / burstiness, n)
    times = np.cumsum(gaps)
    return times * (n / rate / times[-1])


def read_trace(path: Path, ids: np.ndarray, rng: np.random.Generator) -> tuple[list[Request], np.ndarray]:
    """Requests and arrivals of a JSONL trace: timestamp (ms), input_length, output_length, and hash_ids if it has them.

    That is the format of the Mooncake traces: equal hash ids stand for equal blocks of 512 tokens of the prompt.

    Raises:
        UserError: with file and line, for a line that is not such an object, or goes back in time.
    """
    blocks: dict[int, list[int]] = {}
    requests: list[Request] = []
    times: list[float] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); --trace is a JSONL file") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            asked, answered, at_s = int(row["input_length"]), int(row["output_length"]), float(row["timestamp"]) / 1e3
            if asked < 1 or answered < 1 or at_s < (times[-1] if times else 0):
                raise ValueError
            prompt: list[int] = []
            for block in row.get("hash_ids", ()):
                prompt += blocks.setdefault(block, rng.choice(ids, BLOCK_OF_HASH).tolist())
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: no arrival; a line has timestamp (ms, not falling), input_length and output_length"
            ) from None
        own = rng.choice(ids, max(0, asked - len(prompt))).tolist()
        requests.append(Request(prompt[:asked] + own, answered))
        times.append(at_s)
    if not requests:
        raise UserError(f"{path} is empty; --trace needs a line for each request")
    return requests, np.array(times)


# ---------------------------------------------------------------- what came back


@dataclass
class Record:
    """One request. Times are seconds since the run began; arrivals_s has one for each chunk of tokens (see Answer).

    Definitions are those of `vllm bench serve`; t0 is when the request was sent, a_1 … a_m its chunks' arrivals, n its
    completion tokens by the server's count:

        TTFT = a_1 - t0         time to first token
        E2E  = a_m - t0         end-to-end latency
        ITL  = a_i - a_(i-1)    inter-token latency: one for each chunk after the first, m - 1 of them
        TPOT = (E2E - TTFT) / (n - 1)   time per output token after the first; none for n = 1

    Several tokens in one chunk are one ITL: it is what the user's screen waits for. TPOT counts tokens.
    """

    index: int
    scheduled_s: float
    called_s: float  # handed to the client: later than scheduled by the sender's lag
    sent_s: float = math.nan  # later than called where the client limits its concurrency, or had to try again
    arrivals_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.arrivals_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        return (self.e2e_s - self.ttft_s) / (self.completion_tokens - 1) if self.completion_tokens > 1 else None

    @property
    def itl_s(self) -> list[float]:
        return np.diff(self.arrivals_s).tolist()

    @property
    def ttft_scheduled_s(self) -> float:
        return self.arrivals_s[0] - self.scheduled_s

    @property
    def e2e_scheduled_s(self) -> float:
        return self.arrivals_s[-1] - self.scheduled_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Sender:
    """Sends requests through a client and keeps a record of each; `began` is the run's zero (perf_counter)."""

    def __init__(self, client: Client, model: str, on_end: Callable[[Record], None], **options: Any) -> None:
        self.client, self.model, self.options, self.on_end = client, model, options, on_end
        self.began = time.perf_counter()

    async def send(self, index: int, request: Request, scheduled_s: float | None) -> Record:
        now_s = time.perf_counter() - self.began
        record = Record(index, now_s if scheduled_s is None else float(scheduled_s), now_s)
        try:
            answer = await self.client.complete(
                request.prompt, model=self.model, max_tokens=request.max_tokens, ignore_eos=True, **self.options
            )
            record.sent_s = answer.sent_s - self.began
            record.arrivals_s = [at_s - self.began for at_s in answer.arrivals_s]
            record.prompt_tokens = answer.prompt_tokens or 0
            record.completion_tokens = answer.completion_tokens or sum(answer.tokens)
            if not record.arrivals_s:
                record.error = "the answer held no token"
        except RequestFailed as error:
            record.error = str(error)
        self.on_end(record)
        return record

    async def open_loop(self, requests: Sequence[Request], times: np.ndarray) -> list[Record]:
        """Send request i at times[i], whatever has been answered by then."""
        tasks = []
        self.began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, (request, at_s) in enumerate(zip(requests, times, strict=True)):
                await asyncio.sleep(max(0.0, self.began + at_s - time.perf_counter()))
                tasks.append(group.create_task(self.send(index, request, at_s)))
        return [task.result() for task in tasks]

    async def closed_loop(self, requests: Sequence[Request], concurrency: int) -> list[Record]:
        """Keep `concurrency` requests in flight until all are answered."""
        waiting = iter(enumerate(requests))
        records: list[Record] = []

        async def one_after_another() -> None:
            for index, request in waiting:
                records.append(await self.send(index, request, None))

        self.began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(one_after_another())
        return sorted(records, key=lambda record: record.index)


@contextlib.asynccontextmanager
async def loop_lag(interval_s: float = 0.01) -> AsyncIterator[list[float]]:
    """Seconds by which this process was late each time it meant to wake: so late may an arrival have been noticed."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            due = time.perf_counter() + interval_s
            await asyncio.sleep(interval_s)
            late.append(time.perf_counter() - due)

    task = asyncio.create_task(beat())
    try:
        yield late
    finally:
        task.cancel()


# ---------------------------------------------------------------- metrics


def slo(text: str) -> tuple[str, float]:
    """argparse type: a bound on one metric, NAME:MILLISECONDS, NAME one of ttft, tpot, e2e."""
    name, _, bound = text.partition(":")
    try:
        bound_ms = float(bound)
        if name not in ("ttft", "tpot", "e2e") or not bound_ms > 0:
            raise ValueError
    except ValueError:
        raise UserError(f"{text!r} is no objective; give ttft:200, tpot:50 or e2e:2000 (milliseconds)") from None
    return name, bound_ms


def meets(record: Record, bounds_ms: dict[str, float]) -> bool:
    """Whether a request was answered within all bounds. TTFT and E2E count from the scheduled arrival."""
    if record.error:
        return False
    seen = {"ttft": record.ttft_scheduled_s, "e2e": record.e2e_scheduled_s, "tpot": record.tpot_s or 0.0}
    return all(seen[name] * 1e3 <= bound_ms for name, bound_ms in bounds_ms.items())


def distribution(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (linear interpolation, as numpy's and vLLM's) in milliseconds; NaN of nothing."""
    values = np.asarray(seconds if len(seconds) else [math.nan]) * 1e3
    found = {f"{name}_ms_mean": float(values.mean())}
    return found | {f"{name}_ms_p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def summary(records: Sequence[Record], bounds_ms: dict[str, float] | None = None) -> dict[str, float]:
    """The run in figures. Throughput = what was completed / (start of the schedule to the last token of all).

    Goodput (Zhong et al., DistServe, OSDI 2024) counts only requests that met every bound of the objective.
    """
    done = [record for record in records if not record.error]
    duration_s = max((record.arrivals_s[-1] for record in done), default=math.nan)
    chunks = sum(len(record.arrivals_s) for record in done)
    asked, answered = sum(r.prompt_tokens for r in done), sum(r.completion_tokens for r in done)
    figures: dict[str, float] = {
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration_s": duration_s,
        "requests_per_s": len(done) / duration_s,
        "output_tokens_per_s": answered / duration_s,
        "total_tokens_per_s": (asked + answered) / duration_s,
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "tokens_per_chunk": answered / chunks if chunks else math.nan,
        **distribution("ttft", [r.ttft_s for r in done]),
        **distribution("tpot", [r.tpot_s for r in done if r.tpot_s is not None]),
        **distribution("itl", [gap for r in done for gap in r.itl_s]),
        **distribution("e2e", [r.e2e_s for r in done]),
        **distribution("ttft_scheduled", [r.ttft_scheduled_s for r in done]),
        **distribution("e2e_scheduled", [r.e2e_scheduled_s for r in done]),
        "lag_ms_p99": float(np.percentile([r.called_s - r.scheduled_s for r in records], 99)) * 1e3,
    }
    if bounds_ms:
        figures["goodput_per_s"] = sum(meets(record, bounds_ms) for record in records) / duration_s
        figures["within_slo"] = sum(meets(record, bounds_ms) for record in records) / len(records)
    return figures
