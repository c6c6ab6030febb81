"""What the router counts, under its own prefix, in Prometheus' text format.

Counting is adding to plain numbers. Text is made of them when somebody asks, in some 0.1 ms for ten workers: so little
that it needs no thread, and no request waits for a scrape. Nothing is asked of a worker for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ch06_vllm.engine.metrics import Histogram

if TYPE_CHECKING:
    from ch07_sglang_routing.router.workers import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ADDED_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
BREAKERS = {"closed": 0, "half-open": 1, "open": 2}


class Metrics:
    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()  # (worker, status); "" is the router itself
        self.retries: Counter[str] = Counter()  # by reason
        self.broken: Counter[str] = Counter({"client_left": 0, "worker_lost": 0, "timeout": 0})
        self.prompt_tokens = self.matched_tokens = 0.0
        self.request_s = Histogram(SECONDS)  # from the request's last byte to the answer's
        self.first_byte_s = Histogram(SECONDS)  # to the answer's first
        self.choose_s = Histogram(ADDED_S)

    def text(self, workers: Iterable[Worker], clients: int) -> bytes:
        return "\n".join([*self._lines(list(workers), clients), ""]).encode()

    def _lines(self, workers: list[Worker], clients: int) -> Iterator[str]:
        yield from _family("requests_total", "counter", "Answers by worker and status; no worker: the router's own.")
        for (worker, status), count in self.answers.items():
            yield f'router_requests_total{{worker="{worker}",status="{status}"}} {count}'
        yield from _family("retries_total", "counter", "Attempts that were followed by another, by reason.")
        for reason, count in self.retries.items():
            yield f'router_retries_total{{reason="{reason}"}} {count}'
        yield from _family("broken_total", "counter", "Requests that did not get their whole answer, by reason.")
        for reason, count in self.broken.items():
            yield f'router_broken_total{{reason="{reason}"}} {count}'
        for name, what, now in (
            (
                "prompt_tokens_total",
                "Tokens of prompts that the policy looked at (text: characters / 4).",
                self.prompt_tokens,
            ),
            (
                "matched_tokens_total",
                "Of those, what the chosen worker was thought to have cached.",
                self.matched_tokens,
            ),
        ):
            yield from _family(name, "counter", what)
            yield f"router_{name} {now!r}"
        yield from _family("connections", "gauge", "Open connections of clients.")
        yield f"router_connections {clients}"
        for name, what, of in (
            ("in_flight", "Requests sent to a worker and not yet answered to the end.", lambda w: w.in_flight),
            ("pending_tokens", "Prompt tokens sent whose first token has not come.", lambda w: w.pending_tokens),
            ("worker_up", "Whether its health check succeeds.", lambda w: int(bool(w.healthy))),
            ("breaker", "Its circuit breaker: 0 closed, 1 half-open, 2 open.", lambda w: BREAKERS[w.breaker.state]),
        ):
            yield from _family(name, "gauge", what)
            for worker in workers:
                yield f'router_{name}{{worker="{worker.name}"}} {of(worker)}'
        for name, what, histogram in (
            ("request_seconds", "From a request's last byte to the last of its answer.", self.request_s),
            ("first_byte_seconds", "From a request's last byte to the first of its answer.", self.first_byte_s),
            ("choose_seconds", "What reading the prompt and choosing a worker takes.", self.choose_s),
        ):
            yield from _family(name, "histogram", what)
            counts = histogram.cumulative()
            for bound, count in counts:
                yield f'router_{name}_bucket{{le="{bound}"}} {count}'
            yield f"router_{name}_sum {histogram.sum!r}"
            yield f"router_{name}_count {counts[-1][1]}"


def _family(name: str, kind: str, what: str) -> tuple[str, str]:
    return f"# HELP router_{name} {what}", f"# TYPE router_{name} {kind}"
