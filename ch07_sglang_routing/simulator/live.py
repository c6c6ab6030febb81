"""The same trace on real servers of chapter 6's engine: what the simulator is held against, and its coefficients.

Everything is measured from outside, through HTTP, with all servers doing the same at once: they share the machine's
cores with each other and with the client, and a step is as long as it is under those conditions.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ch06_vllm import scrape
from ch06_vllm.client import Client
from ch06_vllm.servers import Server
from ch07_sglang_routing.simulator.physics import Physics
from ch07_sglang_routing.simulator.run import Book, Chooser, Played
from ch07_sglang_routing.simulator.traces import Asked, Trace

PATH = "/v1/completions"
PAUSE_S = 0.2  # between measurements, on average: caches are as cold then, and cores as asleep, as in a trace


def prompt(asked: Asked, ids: np.ndarray, salt: int = 0) -> list[int]:
    """Its tokens in the model's vocabulary: the same number is always the same id, with another salt another one."""
    mixed = np.frombuffer(asked.tokens(), dtype=np.int64).astype(np.uint64) + np.uint64(salt << 44)
    for shift in (30, 27):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
    return ids[(mixed >> np.uint64(33)) % np.uint64(len(ids))].tolist()


@dataclass
class Times:
    """Of one answer, by time.perf_counter."""

    sent_s: float
    arrivals_s: list[float]

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s


async def answer(
    client: Client, model: str, tokens: list[int], output: int, on_first: Callable[[], None] | None = None
) -> Times:
    """One request, to its end."""
    body = {"model": model, "prompt": tokens, "max_tokens": output, "ignore_eos": True, "temperature": 0}
    times = Times(time.perf_counter(), [])
    async with client.stream(PATH, body) as chunks:
        async for chunk in chunks:
            if chunk.tokens or chunk.finish_reason:  # a last token without text comes with the finish reason alone
                if not times.arrivals_s and on_first:
                    on_first()
                times.arrivals_s.append(chunk.at_s)
    return times


async def play(trace: Trace, chooser: Chooser, servers: Sequence[Server], ids: np.ndarray, salt: int = 0) -> Played:
    """Each request at its moment, to the server that the policy says; as simulator.run.play, with a real clock.

    Another salt is other words: nothing is found that an earlier trace left in the caches.

    Latencies count from the moment at which a request should have been sent (no coordinated omission).
    """
    book = Book(trace, len(servers))
    prompts = [prompt(asked, ids, salt) for asked in trace]
    first_s, finish_s = np.zeros(len(trace)), np.zeros(len(trace))
    before = [hits(server) for server in servers]

    async def one(index: int, client: Client, model: str) -> None:
        times = await answer(client, model, prompts[index], trace[index].output, lambda: book.first_token(index))
        book.end(index)
        first_s[index], finish_s[index] = times.arrivals_s[0] - began, times.arrivals_s[-1] - began

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(server.url, concurrency=len(trace))) for server in servers]
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, asked in enumerate(trace):
                await asyncio.sleep(max(0.0, began + asked.at_s - time.perf_counter()))
                worker = book.send(index, chooser)
                group.create_task(one(index, clients[worker], servers[worker].model))
    found = np.array([hits(server) for server in servers]) - before
    prompt_tokens = np.array([asked.prompt for asked in trace])
    share = found.sum() / prompt_tokens.sum()  # the servers tell only the sum
    return book.close(first_s, finish_s, prompt_tokens * share)


def hits(server: Server) -> float:
    """Tokens that the server has found in its prefix cache so far."""
    return scrape.scrape(server.url)["vllm:prefix_cache_hits_total"]


# ---------------------------------------------------------------- calibration

# How often each of Physics' terms is in a measured time, in the order of its fields: seconds that were measured.
Samples = dict[tuple[float, ...], list[float]]


async def measure(
    servers: Sequence[Server],
    ids: np.ndarray,
    into: Samples,
    rng: np.random.Generator,
    *,
    prompts: Sequence[int] = (32, 128, 256, 448),
    batches: Sequence[int] = (1, 3, 8),
    contexts: Sequence[int] = (48, 384),
    tokens: int = 20,
) -> None:
    """Prefill by prompt length, decode by batch and context, on all these servers at once.

    A prompt alone: TTFT = request_s + step_s + n prefill_token_s + n (n + 1) / 2 prefill_pair_s.
    A batch that decodes: time between tokens = step_s + b decode_seq_s + (sum of contexts) decode_context_s.
    A prompt beside it: the former, in a step of both, and before it half of a step of the latter.
    """
    begin = tokens // 4  # by then all prompts are computed, and up to the last token but one all still decode
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(server.url, concurrency=max(batches))) for server in servers]
        for length in prompts:
            due_s = await _moment(rng)
            told = await _together(clients, servers, ids, rng, 1, length, 1)
            terms = (1.0, length, length * (length + 1) / 2, 0.0, 0.0, 1.0)
            into.setdefault(terms, []).extend(times.arrivals_s[0] - due_s for times in told)
        for batch, context in itertools.product(batches, contexts):
            await _moment(rng)
            told = await _together(clients, servers, ids, rng, batch, context, tokens)
            terms = (1.0, 0.0, 0.0, batch, batch * (context + (begin + tokens) / 2), 0.0)
            into.setdefault(terms, []).extend(
                (t.arrivals_s[-2] - t.arrivals_s[begin]) / (len(t.arrivals_s) - 2 - begin)
                for t in told
                if len(t.arrivals_s) > begin + 2  # a client that falls behind reads several tokens at once
            )
        for batch, length in itertools.product((2, 4), (48, 192)):
            await _moment(rng)
            beside = [_beside(*pair, ids, rng, batch, 128, length) for pair in zip(clients, servers, strict=True)]
            terms = (1.5, length, length * (length + 1) / 2, 1.5 * batch, 1.5 * batch * 136.0, 1.0)
            into.setdefault(terms, []).extend(await asyncio.gather(*beside))


async def _moment(rng: np.random.Generator) -> float:
    """A while later; when that should be. As in `play` a timer's delay counts."""
    due_s = time.perf_counter() + rng.exponential(PAUSE_S)
    await asyncio.sleep(due_s - time.perf_counter())
    return due_s


async def _beside(
    client: Client, server: Server, ids: np.ndarray, rng: np.random.Generator, batch: int, context: int, length: int
) -> float:
    """The TTFT of a prompt that comes while `batch` others decode, a few tokens each so far."""
    underway = asyncio.Event()
    body = {"model": server.model, "max_tokens": 500, "ignore_eos": True, "temperature": 0}
    arrived = 0

    async def decode() -> None:
        nonlocal arrived
        async with client.stream(PATH, body | {"prompt": rng.choice(ids, context).tolist()}) as chunks:
            async for _ in chunks:
                arrived += 1
                if arrived >= 4 * batch:
                    underway.set()

    async with asyncio.TaskGroup() as group:
        others = [group.create_task(decode()) for _ in range(batch)]
        async with asyncio.timeout(60):
            await underway.wait()
        times = await answer(client, server.model, rng.choice(ids, length).tolist(), 1)
        for other in others:
            other.cancel()
    return times.ttft_s


async def _together(
    clients: Sequence[Client], servers: Sequence[Server], ids: np.ndarray, rng: np.random.Generator,
    batch: int, prompt_tokens: int, output: int,
) -> list[Times]:  # fmt: skip
    """`batch` requests to each server at once."""
    return await asyncio.gather(
        *(
            answer(client, server.model, rng.choice(ids, prompt_tokens).tolist(), output)
            for client, server in zip(clients, servers, strict=True)
            for _ in range(batch)
        )
    )


def fit(measured: Samples) -> Physics:
    """Least squares of the relative errors of the means, no coefficient below zero: one that would be is left out.

    Means, as what now and then takes long on a busy machine does so in a run too.
    """
    terms = np.array(list(measured))
    seconds = np.array([statistics.fmean(found) for found in measured.values()])
    scaled = terms / seconds[:, None]
    used = [column for column in range(terms.shape[1]) if terms[:, column].any()]
    while True:
        norms = np.linalg.norm(scaled[:, used], axis=0)
        values = np.linalg.lstsq(scaled[:, used] / norms, np.ones(len(seconds)), rcond=None)[0]
        if (values >= 0).all():
            break
        del used[int(values.argmin())]
    coefficients = np.zeros(terms.shape[1])
    coefficients[used] = values / norms
    return Physics(*coefficients.tolist())


def blend(alone: Physics, together: Physics, busy: float) -> Physics:
    """A server whose neighbours compute for this share of the time, on cores that they share."""
    pairs = zip(astuple(alone), astuple(together), strict=True)
    return Physics(*((1 - busy) * one + busy * other for one, other in pairs))
